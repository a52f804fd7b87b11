"""The schedulers by hand-worked cases: capacity policies, budgets, chunks, admission bounds, and what a step costs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest

from tensorweave.cluster.errors import ContextTooLong
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.executor.bookkeeping import book_launch, book_result
from tensorweave.workers.executor.capacity_scheduler import CapacityPolicy, CapacityScheduler
from tensorweave.workers.executor.dry_run import DryRun
from tensorweave.workers.executor.prompt_share import FixedShare
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.result import StepResult


def _requests(*sizes: tuple[int, int], priorities: tuple[int, ...] = ()) -> list[LlmRequest]:
    """One request for each (prompt length, max_tokens), sharing no prefix."""
    requests = []
    for order, (prompt_len, max_tokens) in enumerate(sizes):
        tokens = [100 * order + i for i in range(prompt_len)]
        priority = priorities[order] if priorities else 0
        requests.append(LlmRequest(f"r{order}", order, tokens, prompt_len, SamplingSpec(max_tokens), priority=priority))
    return requests


def _loop(requests: list[LlmRequest], num_blocks: int, tokens_per_block: int = 4, **knobs: Any) -> DryRun:
    kv = KVCacheManager(num_blocks, tokens_per_block)
    knobs = {"max_batch_size": 16, "max_num_tokens": 100, **knobs}
    loop = DryRun(
        ResourceManager([kv]),
        SimpleScheduler(kv, **knobs),
        max_batch_size=knobs["max_batch_size"],
        max_num_tokens=knobs["max_num_tokens"],
        vocab_size=50_000,
    )
    for request in requests:
        loop.add(request)
    return loop


def _shape(batch: ScheduledBatch) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
    """(order, start, length) of the chunks, orders of the decoding, orders of the paused."""
    chunks = [(chunk.request.order, chunk.start, chunk.length) for chunk in batch.context]
    return chunks, [row.request.order for row in batch.generation], [request.order for request in batch.paused]


# ---- capacity


def test_no_evict_reserves_to_completion_and_blocks_the_line() -> None:
    """Ten blocks: 4 + 4 are reserved, the third asks 3 and waits, the small fourth does not pass it."""
    loop = _loop(_requests((8, 9), (8, 9), (8, 5), (1, 1)), num_blocks=10)
    assert _shape(loop.step())[0] == [(0, 0, 8), (1, 0, 8)]
    for _ in range(8):
        assert _shape(loop.step()) == ([], [0, 1], [])
    assert _shape(loop.step())[0] == [(2, 0, 8), (3, 0, 1)]
    loop.run()
    assert all(request.num_preemptions == 0 for request in loop.finished)


@pytest.mark.parametrize("counts_on_ends", [True, False])
def test_no_evict_counts_on_what_ends_before_others_need_its_blocks(counts_on_ends: bool) -> None:
    """13 blocks; the requests need 5, 6 and 3. When the first ends with its fifth, the second has no more than five."""
    first, second, third = _requests((8, 11), (8, 16), (8, 5))
    loop = _loop([first], num_blocks=13)
    scheduler = loop.scheduler
    assert isinstance(scheduler, SimpleScheduler)
    kv = loop.resources.kv_cache
    scheduler.capacity = CapacityScheduler(kv, "GUARANTEED_NO_EVICT", 16, counts_on_ends)
    for _ in range(2):
        loop.step()
    loop.add(second)
    loop.add(third)
    assert _shape(loop.step()) == ([(1, 0, 8)], [0], []), "when the second will grow is not known before it decodes"
    assert _shape(loop.step()) == ([(2, 0, 8)] if counts_on_ends else [], [0, 1], [])
    loop.run()


def test_no_evict_counts_a_prefix_in_use_only_once() -> None:
    """Six blocks: each request needs four, of which two are the same prompt's."""
    first, second = _requests((9, 5), (9, 5))
    second.tokens[:] = first.tokens
    loop = _loop([first], num_blocks=6)
    loop.step()
    loop.add(second)
    assert _shape(loop.step()) == ([(1, 8, 1)], [0], [])
    loop.run()


def test_max_utilization_admits_for_the_next_step_and_pauses_the_last_started() -> None:
    """Eight blocks hold both contexts; both grow, and when a ninth is needed the second waits, and comes back."""
    loop = _loop(_requests((8, 13), (8, 13)), num_blocks=8, policy="MAX_UTILIZATION")
    assert _shape(loop.step())[0] == [(0, 0, 8), (1, 0, 8)]
    for _ in range(8):
        assert _shape(loop.step()) == ([], [0, 1], [])
    assert _shape(loop.step()) == ([], [0], [1])
    second = loop.active[1]
    assert (second.state, second.num_preemptions, second.context_len) == (RequestState.WAITING, 1, 17)
    for _ in range(3):
        assert _shape(loop.step()) == ([], [0], [])
    chunks, _, _ = _shape(loop.step())
    assert chunks == [(1, 12, 5)], "three of its four blocks are still there; the first request has taken the last"
    loop.run()


def test_max_utilization_pauses_the_least_urgent() -> None:
    requests = _requests((8, 13), (8, 13), priorities=(0, 1))
    loop = _loop(requests, num_blocks=8, policy="MAX_UTILIZATION")
    paused = []
    while loop.active:
        paused += _shape(loop.step())[2]
    assert paused == [0]


@pytest.mark.parametrize(("num_blocks", "has_room"), [(200, True), (190, False), (20, False)])
def test_no_more_are_let_in_than_a_step_begins(num_blocks: int, has_room: bool) -> None:
    """Ten requests of 20 blocks; what a plan does not look at is counted without what is cached."""
    kv = KVCacheManager(num_blocks, 4)
    scheduler = CapacityScheduler(kv, "GUARANTEED_NO_EVICT", 16, max_new_tokens=100)
    plan = scheduler.schedule_request(_requests(*[(50, 29)] * 10))
    num_let_in = min(2, num_blocks // 20)
    assert list(plan.starts) == list(range(num_let_in))
    assert plan.has_room is has_room
    few = CapacityScheduler(kv, "GUARANTEED_NO_EVICT", 9, max_new_tokens=100)
    assert not few.schedule_request(_requests(*[(50, 29)] * 10)).has_room, "nine at most"


def test_no_evict_would_not_have_let_the_second_in() -> None:
    loop = _loop(_requests((8, 13), (8, 13)), num_blocks=8)
    assert _shape(loop.step())[0] == [(0, 0, 8)]
    loop.run()


def test_a_static_batch_ends_before_the_next_begins() -> None:
    loop = _loop(_requests((4, 2), (4, 4), (4, 1)), num_blocks=50, policy="STATIC_BATCH", max_batch_size=2)
    assert _shape(loop.step())[0] == [(0, 0, 4), (1, 0, 4)]
    assert _shape(loop.step()) == ([], [0, 1], [])
    assert _shape(loop.step()) == ([], [1], [])
    assert _shape(loop.step()) == ([], [1], [])
    assert _shape(loop.step())[0] == [(2, 0, 4)]


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"])
def test_a_request_that_fills_the_pool_runs_alone(policy: CapacityPolicy) -> None:
    loop = _loop(_requests((8, 9), (8, 9), (3, 2)), num_blocks=4, policy=policy)
    loop.run()
    assert [request.num_output for request in sorted(loop.finished, key=lambda r: r.order)] == [9, 9, 2]


def test_a_plan_changes_nothing() -> None:
    (request,) = _requests((8, 9))
    kv = KVCacheManager(10, 4)
    scheduler = SimpleScheduler(kv)
    plans = [scheduler.schedule_request([request]) for _ in range(2)]
    assert plans[0] == plans[1]
    assert (request.state, request.num_computed, kv.available) == (RequestState.WAITING, 0, 10)


# ---- budgets and chunks


def test_decodes_come_first_and_prompts_share_the_rest() -> None:
    requests = _requests((4, 9), (4, 9), (30, 1))
    loop = _loop(requests[:2], num_blocks=50, max_num_tokens=12)
    loop.step()
    loop.add(requests[2])
    assert _shape(loop.step()) == ([(2, 0, 8)], [0, 1], [])
    assert _shape(loop.step()) == ([(2, 8, 8)], [0, 1], [])
    assert _shape(loop.step()) == ([(2, 16, 8)], [0, 1], [])
    assert _shape(loop.step()) == ([(2, 24, 6)], [0, 1], [])


def test_first_come_fills_in_order_and_ends_chunks_on_blocks() -> None:
    loop = _loop(_requests((10, 1), (20, 1), (3, 1)), num_blocks=50, max_num_tokens=19)
    assert _shape(loop.step())[0] == [(0, 0, 10), (1, 0, 8)]
    assert _shape(loop.step())[0] == [(1, 8, 12), (2, 0, 3)]


def test_a_new_prompt_waits_for_a_step_that_holds_it_whole() -> None:
    loop = _loop(_requests((15, 1), (20, 2), (3, 1)), num_blocks=50, max_num_tokens=20)
    assert _shape(loop.step())[0] == [(0, 0, 15)]
    assert _shape(loop.step())[0] == [(1, 0, 20)]
    assert _shape(loop.step()) == ([(2, 0, 3)], [1], [])


def test_a_new_prompt_is_cut_where_a_quarter_of_the_step_would_stay_empty() -> None:
    loop = _loop(_requests((12, 1), (20, 1)), num_blocks=50, max_num_tokens=20)
    assert _shape(loop.step())[0] == [(0, 0, 12), (1, 0, 8)]
    assert _shape(loop.step())[0] == [(1, 8, 12)]


def test_a_new_prompt_that_decodes_leave_no_room_for_is_cut() -> None:
    """It would wait for ever: each step has fifteen decodes, so none has room for all of it."""
    loop = _loop(_requests(*[(1, 90)] * 15, (9, 1)), num_blocks=400, max_num_tokens=20)
    loop.step()
    assert _shape(loop.step())[0] == [(15, 0, 4)]


@pytest.mark.parametrize("policy", ["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"])
def test_steps_with_cut_prompts_end_on_the_edge_of_a_tile(policy: str) -> None:
    knobs: dict[str, Any] = {"max_num_tokens": 700, "chunking_policy": policy, "tokens_per_block": 32}
    loop = _loop(_requests((1920, 1), (1920, 1)), num_blocks=200, **knobs)
    num_tokens = [loop.step().num_tokens for _ in range(6)]
    assert num_tokens == [640] * 6
    loop = _loop(_requests(*[(1, 9)] * 5, (2000, 1)), num_blocks=200, **knobs)
    loop.step()
    assert loop.step().num_tokens == 5 + 608, "a chunk ends on a block, so at most a block less than on the edge"


def test_a_tile_that_decodes_have_begun_is_filled() -> None:
    loop = _loop(_requests(*[(1, 9)] * 260, (90, 1)), num_blocks=900, max_num_tokens=312, max_batch_size=300)
    loop.step()
    assert loop.step().num_tokens == 312


def test_beside_decodes_a_step_has_few_prompt_tokens() -> None:
    """The first prompt has a step to itself; the second comes in pieces while the first answers."""
    loop = _loop(_requests((4, 9), (40, 2)), num_blocks=40, max_batch_size=2, share=FixedShare(16))
    late = loop.active.pop(1)
    assert _shape(loop.step())[0] == [(0, 0, 4)]
    loop.add(late)
    shapes = [_shape(loop.step())[:2] for _ in range(3)]
    assert shapes == [([(1, 0, 16)], [0]), ([(1, 16, 16)], [0]), ([(1, 32, 8)], [0])]


def test_equal_progress_goes_round_by_blocks() -> None:
    knobs: dict[str, Any] = {"max_num_tokens": 22, "chunking_policy": "EQUAL_PROGRESS"}
    loop = _loop(_requests((20, 1), (20, 1), (3, 1)), num_blocks=50, **knobs)
    assert _shape(loop.step())[0] == [(0, 0, 8), (1, 0, 8), (2, 0, 3)]
    assert _shape(loop.step())[0] == [(0, 8, 12), (1, 8, 8)]
    assert _shape(loop.step())[0] == [(1, 16, 4)]


def test_a_budget_below_a_block_still_moves() -> None:
    for policy in ("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"):
        loop = _loop(_requests((10, 2), (5, 2)), num_blocks=50, max_num_tokens=3, chunking_policy=policy)
        assert _shape(loop.step())[0] == [(0, 0, 3)]
        loop.run()


def test_a_chunk_after_a_partly_reused_block_ends_on_the_boundary() -> None:
    first, second = _requests((8, 1), (30, 1))
    second.tokens[:6] = first.tokens[:6]
    loop = _loop([first], num_blocks=50, max_num_tokens=11)
    loop.run()
    loop.add(second)
    assert _shape(loop.step())[0] == [(1, 6, 10)]


def test_at_most_max_batch_size_requests_run() -> None:
    loop = _loop(_requests(*[(2, 3)] * 5), num_blocks=50, max_batch_size=2)
    assert _shape(loop.step())[0] == [(0, 0, 2), (1, 0, 2)]
    assert _shape(loop.step()) == ([], [0, 1], [])
    loop.run()


def test_without_chunks_a_prompt_waits_for_a_step_with_room() -> None:
    loop = _loop(_requests((6, 3), (6, 3), (2, 1)), num_blocks=50, max_num_tokens=10, enable_chunked_prefill=False)
    assert _shape(loop.step()) == ([(0, 0, 6)], [], [])
    assert _shape(loop.step()) == ([(1, 0, 6), (2, 0, 2)], [0], [])
    loop.run()


def test_without_chunks_a_paused_context_over_the_budget_is_split() -> None:
    requests = _requests((7, 20), (7, 20))
    knobs: dict[str, Any] = {"max_num_tokens": 8, "enable_chunked_prefill": False, "policy": "MAX_UTILIZATION"}
    kv = KVCacheManager(8, 4, enable_block_reuse=False)
    loop = DryRun(ResourceManager([kv]), SimpleScheduler(kv, **knobs), max_batch_size=16, max_num_tokens=8)
    for request in requests:
        loop.add(request)
    loop.run()
    assert sum(request.num_preemptions for request in requests) >= 1
    assert [request.num_output for request in requests] == [20, 20]


# ---- admission


def test_check_names_what_can_never_run() -> None:
    scheduler = SimpleScheduler(KVCacheManager(8, 4), max_num_tokens=16)
    scheduler.check(32, 1)
    scheduler.check(1, 32)
    with pytest.raises(ContextTooLong, match="33 in the prompt, 1 in the completion") as long_prompt:
        scheduler.check(33, 1)
    with pytest.raises(ContextTooLong, match="maximum context length is 33 tokens") as long_output:
        scheduler.check(32, 2)
    assert (long_prompt.value.param, long_output.value.param) == ("prompt", "max_tokens")
    with pytest.raises(ContextTooLong, match="limit of 16 tokens"):
        SimpleScheduler(KVCacheManager(8, 4), max_num_tokens=16, enable_chunked_prefill=False).check(17, 1)
    with pytest.raises(ValueError, match="must be at least 1"):
        SimpleScheduler(KVCacheManager(8, 4), max_batch_size=0)


# ---- cost


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"])
def test_a_decode_step_costs_little(policy: CapacityPolicy) -> None:
    """Schedule + prepare + update of a decode-only step; measured 0.04 to 0.09 ms at 256 on a 2-core laptop CPU. Time
    of this thread on a processor: what others take of it does not count."""
    for num_requests in (16, 64, 256):
        kv = KVCacheManager(num_requests * 20, 32)
        resources, scheduler = ResourceManager([kv]), SimpleScheduler(kv, policy=policy, max_num_tokens=100_000)
        requests = _requests(*[(30 + i % 64, 400) for i in range(num_requests)])
        durations_s = [_timed_step(scheduler, resources, requests) for _ in range(200)]
        median_s = statistics.median(durations_s[1:])
        print(
            f"{policy}, {num_requests} running: {median_s * 1e3:.3f} ms a step, context {durations_s[0] * 1e3:.1f} ms"
        )
        assert median_s < 2e-3


def _timed_step(scheduler: SimpleScheduler, resources: ResourceManager, active: list[LlmRequest]) -> float:
    began_s = time.thread_time()
    batch = scheduler.schedule_request(active)
    resources.prepare_resources(batch)
    spent_s = time.thread_time() - began_s
    for row in batch.context:
        assert row == StepRow(row.request, 0, row.request.context_len, 1)
    assert len(batch.sampled) == len(active)
    book_launch(batch)
    book_result(batch, StepResult([[row.request.order] for row in batch.sampled]))
    began_s = time.thread_time()
    resources.update_resources(batch)
    return spent_s + time.thread_time() - began_s
