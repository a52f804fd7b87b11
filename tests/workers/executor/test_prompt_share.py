"""How many prompt tokens a step has beside decodes: each part of the rule by itself, then whole runs over a model of a
GPU's step times, in which every prompt must have its turn in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.executor.bookkeeping import book_launch
from tensorweave.workers.executor.dry_run import DryRun
from tensorweave.workers.executor.prompt_share import BalancedShare, FixedShare, PromptLoad, PromptShare
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.tiles import DECODE_ROWS, STEP_ROWS, prompt_tokens_beside, rows_of_decodes, whole_tiles

MOST = 2048
LARGE_LAYER = 218_000_000
SMALL_LAYER = 16_000_000
NOW_S = 100.0


def _request(order: int, prompt_len: int, max_tokens: int, arrival_s: float = 0.0) -> LlmRequest:
    tokens = [order * 1000 + i for i in range(prompt_len)]
    return LlmRequest(f"r{order}", order, tokens, prompt_len, SamplingSpec(max_tokens), arrival_s=arrival_s)


def _requests(count: int, waited_s: float, prompt_len: int = 1000, max_tokens: int = 200) -> list[LlmRequest]:
    return [_request(i, prompt_len, max_tokens, NOW_S - waited_s) for i in range(count)]


def _asked(
    decodes: Sequence[LlmRequest],
    pending: Sequence[LlmRequest],
    refused: Sequence[LlmRequest] = (),
    blocks: int = 14000,
    layer_weights: int = LARGE_LAYER,
) -> int:
    kv = KVCacheManager(blocks, 32)
    kv.now_s = NOW_S
    share = BalancedShare(kv, MOST, layer_weights)
    return share.most_tokens(PromptLoad(decodes, [(request, 0) for request in pending], refused, has_room=not refused))


def test_a_prompt_alone_fills_what_its_step_leaves() -> None:
    for num_decodes, num_rows in ((8, 256), (32, 256), (33, 512), (100, 512)):
        num_tokens = _asked(_requests(num_decodes, 60.0), _requests(1, 0.1))
        assert num_tokens == num_rows - rows_of_decodes(num_decodes)


def test_more_that_wait_get_more() -> None:
    numbers = [_asked(_requests(200, 10.0), _requests(count, 1.0)) for count in (1, 10, 100)]
    assert numbers == sorted(set(numbers)), "each time more"
    assert numbers[-1] == MOST - 200


def test_where_as_many_wait_as_decode_a_step_has_4096_rows() -> None:
    for num_decodes in (1, 8, 200):
        assert _asked(_requests(num_decodes, 10.0), _requests(num_decodes, 0.1)) == 4096 - num_decodes


def test_no_step_of_small_layers_is_launched_kernel_by_kernel() -> None:
    """As many wait as decode; one has waited long; many wait; long prompts without room."""
    for num_decodes in (1, 8, 200):
        most = 1024 - rows_of_decodes(num_decodes)
        decodes = _requests(num_decodes, 10.0)
        assert _asked(decodes, _requests(num_decodes, 0.1), layer_weights=SMALL_LAYER) == most
        assert _asked(decodes, _requests(1, 10.0), layer_weights=SMALL_LAYER) <= most
    assert _asked(_requests(200, 10.0), _requests(150, 1.0), layer_weights=SMALL_LAYER) == 1024 - 224
    waiting = _requests(224, 1.0, 2048, 128)
    assert _asked(_requests(32, 1.0, 2048, 128), waiting[:10], waiting[10:], layer_weights=SMALL_LAYER) <= 1024 - 32


def test_who_has_waited_almost_as_long_as_others_decode_waits_no_more() -> None:
    decodes = [*_requests(32, 2.0), *_requests(32, 4.0)]
    assert _asked(decodes, _requests(1, 2.3)) == 512 - 64
    assert _asked(decodes, _requests(1, 2.5)) == MOST - 64
    assert _asked(decodes, [*_requests(1, 0.1), *_requests(1, 2.5)]) == MOST - 64, "whoever of them it is"


@pytest.mark.parametrize(
    ("num_requests", "blocks", "expected"),
    [
        (512, 28000, 846),  # all fit if they begin within 605 steps
        (512, 14000, 423),  # two waves of 256 fit if each begins within 605 steps
        (400, 14000, 384),  # two of 200 fit at once, 0.256 begin in a step, and the least counts
        (4096, 14000, 423),  # sixteen of 256
    ],
)
def test_starts_are_spread_where_not_all_have_room(num_requests: int, blocks: int, expected: int) -> None:
    """Prompts and outputs of 1,000 tokens; 97 % of the blocks are counted on."""
    decodes = _requests(32, 1.0, 1000, 1000)
    waiting = _requests(num_requests - 32, 1.0, 1000, 1000)
    num_tokens = _asked(decodes, waiting[:10], waiting[10:], blocks)
    assert num_tokens == min(prompt_tokens_beside(32), key=lambda each: abs(each - expected))


def test_long_prompts_without_room_are_not_held_back() -> None:
    waiting = _requests(224, 1.0, 2048, 128)
    assert _asked(_requests(32, 1.0, 2048, 128), waiting[:10], waiting[10:]) == 4096


def test_no_decode_is_begun_that_costs_a_tile_more_than_it_gains() -> None:
    waiting = _requests(200, 1.0, 1000, 1000)
    assert _asked(_requests(255, 1.0, 1000, 1000), waiting[:1], waiting[1:]) > 0
    assert _asked(_requests(256, 1.0, 1000, 1000), waiting[:1], waiting[1:]) == 0
    assert _asked(_requests(256, 1.0, 1000, 1000), waiting[:1], waiting[1:], 28000) > 0, "400 and more would run"


def test_a_number_that_was_given_stays() -> None:
    assert FixedShare(300).most_tokens(PromptLoad(_requests(8, 1.0), [(_request(9, 10, 1), 0)])) == 300


# ---- sizes


def test_whole_steps_end_on_tiles_with_the_rows_that_decodes_take() -> None:
    for num_decodes in range(513):
        assert num_decodes <= rows_of_decodes(num_decodes) in DECODE_ROWS
        for number in prompt_tokens_beside(num_decodes):
            total = num_decodes + number
            assert whole_tiles(total, num_decodes) == total
            assert total in STEP_ROWS or rows_of_decodes(num_decodes) + number in STEP_ROWS
    assert whole_tiles(700, 0) == 640
    assert whole_tiles(250, 3) == 250, "below two tiles nothing is gained"
    assert rows_of_decodes(600) == 600


# ---- whole runs


class _Run:
    """Clients that send their next request once the last one is answered; a step takes as long as a GPU's of an 8B
    model."""

    def __init__(self, share: Callable[[KVCacheManager], PromptShare]) -> None:
        self.kv = KVCacheManager(14000, 32)
        self.scheduler = SimpleScheduler(self.kv, max_batch_size=512, max_num_tokens=8192, share=share(self.kv))
        self.waits_s: list[float] = []
        self._num_requests = 0

    def serve(self, num_clients: int, num_each: int, prompt_len: int, max_tokens: int) -> None:
        left = [num_each - 1] * num_clients
        client_of: dict[int, int] = {}

        def make(client: int) -> LlmRequest:
            self._num_requests += 1
            client_of[self._num_requests] = client
            return _request(self._num_requests, prompt_len, max_tokens, self.kv.now_s)

        active = [make(client) for client in range(num_clients)]
        while active:
            for request in self._step(active):
                client = client_of[request.order]
                if left[client]:
                    left[client] -= 1
                    active.append(make(client))
            active = [request for request in active if request.state is not RequestState.DONE]

    def _step(self, active: list[LlmRequest]) -> list[LlmRequest]:
        batch = self.scheduler.schedule_request(active)
        assert not batch.is_empty
        self.kv.prepare_resources(batch)
        book_launch(batch)
        self.kv.now_s += _step_s(batch)
        for row in (*batch.context, *batch.generation):
            row.request.num_computed = row.stop
            if row.num_samples:
                row.request.tokens.append(row.request.order)
        self.waits_s += [self.kv.now_s - row.request.arrival_s for row in batch.context if row.num_samples]
        self.kv.update_resources(batch)
        ended = [row.request for row in batch.sampled if len(row.request.tokens) == row.request.max_len]
        for request in ended:
            request.state = RequestState.DONE
            self.kv.free_resources(request)
        return ended


def _step_s(batch: ScheduledBatch) -> float:
    """About what an H100 takes: 6 ms to read the weights, 8 µs a decode, 20 µs a prompt token beyond those that the
    reading hides, and the KV."""
    num_decodes, num_prompt = len(batch.generation), sum(row.length for row in batch.context)
    kv_tokens = sum(row.start for row in batch.generation)
    return 6e-3 + 8e-6 * num_decodes + 20e-6 * max(0, num_prompt - 100) + 42e-9 * kv_tokens


def _balanced(kv: KVCacheManager) -> PromptShare:
    return BalancedShare(kv, MOST, LARGE_LAYER)


@pytest.mark.parametrize("num_clients", [4, 48])
def test_prompts_have_their_turn_in_time(num_clients: int) -> None:
    run = _Run(_balanced)
    run.serve(num_clients, 3, 600, 100)
    assert len(run.waits_s) == 3 * num_clients
    fixed = _Run(lambda kv: FixedShare(MOST))
    fixed.serve(num_clients, 3, 600, 100)
    total_s = fixed.kv.now_s
    assert run.kv.now_s < 1.1 * total_s
    assert max(run.waits_s) < total_s / 3, "nobody waits as long as a request takes"


def test_a_step_has_the_rows_that_were_planned_though_prompts_are_cut() -> None:
    """263 decodes and one prompt of 1,000 tokens are 1,263 rows, and two are more than 2,048."""
    run = _Run(_balanced)
    active = [_request(order, 8, 9) for order in range(263)]
    run._step(active)
    active += [_request(order, 1000, 9) for order in range(263, 300)]
    assert MOST - 32 < run.scheduler.schedule_request(active).num_tokens <= MOST


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"])
@pytest.mark.parametrize("chunking_policy", ["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"])
def test_every_request_ends_under_every_policy(policy: str, chunking_policy: str) -> None:
    kv = KVCacheManager(60, 4)
    knobs = {"policy": policy, "chunking_policy": chunking_policy, "max_batch_size": 6, "max_num_tokens": 64}
    scheduler = SimpleScheduler(kv, share=BalancedShare(kv, 16, LARGE_LAYER), **knobs)  # type: ignore[arg-type]
    loop = DryRun(ResourceManager([kv]), scheduler, max_batch_size=6, max_num_tokens=64)
    for order in range(24):
        loop.add(_request(order, 5 + 7 * order % 90, 1 + 11 * order % 40, arrival_s=0.003 * order))
    loop.run()
    assert len(loop.finished) == 24
