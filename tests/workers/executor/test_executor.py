"""PyExecutor over an engine whose next token is a hash of the context: every token is checked, no model is needed."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorweave.cluster.errors import NotReady, Overloaded, RequestRejected, WorkerLost
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.inbox import Inbox
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import HashEngine, hash_token
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.resources import ResourceManager
from tests.workers.stepped_engine import SteppedEngine
from tests.workers.waiting import WAIT_S, wait_until

VOCAB = 997


EXECUTOR_KNOBS = ("max_requests", "clock", "disable_overlap_scheduler")


def make(num_blocks: int = 64, engine: Any = None, **knobs: Any) -> PyExecutor:
    engine = engine or HashEngine(VOCAB, num_blocks, tokens_per_block=4)
    executing = {name: knobs.pop(name) for name in EXECUTOR_KNOBS if name in knobs}
    kv_cache = KVCacheManager(num_blocks, 4)
    decoder = SamplingDecoder()
    return PyExecutor(
        engine=engine,
        scheduler=SimpleScheduler(kv_cache, **knobs),
        resources=ResourceManager([decoder.states, kv_cache]),
        decoder=decoder,
        comm=SoloComm(),
        info=engine.info,
        **executing,
    )


@pytest.fixture
def executor() -> Iterator[PyExecutor]:
    made = make()
    made.start()
    yield made
    made.shutdown()


def ask(name: str, prompt: Sequence[int], max_tokens: int = 8, **fields: Any) -> GenerateRequest:
    spec = {key: fields.pop(key) for key in ("min_tokens", "stop_token_ids", "temperature", "seed") if key in fields}
    return GenerateRequest(name, list(prompt), SamplingSpec(max_tokens, **spec), **fields)


def oracle(prompt: Sequence[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(hash_token(tokens, VOCAB))
    return tokens[len(prompt) :]


def collect(
    executor: PyExecutor, names: set[str], timeout_s: float = WAIT_S, *, others: Collection[str] = ()
) -> dict[str, list[TokenChunk]]:
    """All chunks of these requests, to their last ones, and those of `others` that come meanwhile."""
    chunks: dict[str, list[TokenChunk]] = {name: [] for name in (*names, *others)}
    give_up_s = time.monotonic() + timeout_s
    open_names = set(names)
    while open_names and time.monotonic() < give_up_s:
        for chunk in executor.await_responses(timeout_s=1.0):
            chunks[chunk.request_id].append(chunk)
            if chunk.is_last:
                open_names.discard(chunk.request_id)
    assert not open_names, f"no end of {open_names}"
    return chunks


def ids(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def is_idle(executor: PyExecutor) -> bool:
    """Waits until nothing is inside; whether the books are right then."""
    kv = executor._resources.kv_cache
    wait_until(lambda: executor.num_requests == 0 and kv.available == kv.num_blocks)
    return kv.audit() == []


def test_tokens_follow_the_context(executor: PyExecutor) -> None:
    prompts = {f"r{i}": [i, 7, 3, *range(i)] for i in range(20)}
    executor.enqueue_requests([ask(name, prompt, 12) for name, prompt in prompts.items()])
    chunks = collect(executor, set(prompts))
    for name, prompt in prompts.items():
        assert ids(chunks[name]) == oracle(prompt, 12)
        assert [chunk.finish_reason for chunk in chunks[name]] == [None] * 11 + ["length"]
    assert is_idle(executor)


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"])
@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_a_small_pool_and_small_chunks_change_no_token(policy: Any, chunk: int) -> None:
    executor = make(num_blocks=12, policy=policy, max_num_tokens=chunk, max_batch_size=4)
    prompts = {f"r{i}": [i % 5] * (3 + i) for i in range(24)}
    executor.enqueue_requests([ask(name, prompt, 14) for name, prompt in prompts.items()])
    executor.start()
    chunks = collect(executor, set(prompts))
    assert {name: ids(chunks[name]) for name in prompts} == {n: oracle(p, 14) for n, p in prompts.items()}
    assert is_idle(executor)
    if policy == "MAX_UTILIZATION" and chunk > 5:
        assert executor.gauges()["num_preemptions_total"] > 0
    executor.shutdown()


def test_reuse_is_reported(executor: PyExecutor) -> None:
    prompt = list(range(40))
    executor.enqueue_request(ask("cold", prompt))
    assert collect(executor, {"cold"})["cold"][-1].num_cached_tokens == 0
    executor.enqueue_request(ask("warm", prompt))
    warm = collect(executor, {"warm"})["warm"]
    assert warm[0].num_cached_tokens >= 36
    assert ids(warm) == oracle(prompt, 8)
    executor.enqueue_request(ask("salted", prompt, cache_salt="other tenant"))
    assert collect(executor, {"salted"})["salted"][0].num_cached_tokens == 0


def test_a_stop_token_ends_and_min_tokens_holds_it_off(executor: PyExecutor) -> None:
    prompt = [1, 2, 3]
    expected = oracle(prompt, 8)
    executor.enqueue_request(ask("stop", prompt, stop_token_ids=(expected[2],)))
    last = collect(executor, {"stop"})["stop"]
    assert ids(last) == expected[:3]
    assert (last[-1].finish_reason, last[-1].stop_reason) == ("stop", expected[2])
    executor.enqueue_request(ask("held", prompt, stop_token_ids=(expected[2],), min_tokens=5))
    held = ids(collect(executor, {"held"})["held"])
    assert expected[2] not in held[:5]


def test_cancel_frees_the_blocks_within_a_step() -> None:
    engine = SteppedEngine(VOCAB, 64, 4)
    executor = make(engine=engine)
    executor.start()
    executor.enqueue_request(ask("long", [1, 2], max_tokens=200))
    engine.allow()
    wait_until(lambda: executor.await_responses(timeout_s=1.0))
    assert executor.cancel_request("long")
    engine.run_free()  # the steps that it may have been in
    chunks = collect(executor, {"long"})["long"]
    assert chunks[-1].finish_reason == "cancelled"
    assert len(ids(chunks)) <= 1
    assert is_idle(executor)
    assert not executor.cancel_request("long")
    assert not executor.cancel_request("never was")
    executor.shutdown()


def test_a_request_cancelled_while_it_waits_ends_too() -> None:
    executor = make(policy="STATIC_BATCH", max_batch_size=1)
    executor.enqueue_requests([ask("first", [1], 50), ask("second", [2], 50)])
    executor.cancel_request("second")
    executor.start()
    chunks = collect(executor, {"first", "second"})
    assert ids(chunks["second"]) == []
    assert chunks["second"][-1].finish_reason == "cancelled"
    assert ids(chunks["first"]) == oracle([1], 50)
    executor.shutdown()


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    engine, now_s = SteppedEngine(VOCAB, 64, 4), [100.0]
    executor = make(engine=engine, clock=lambda: now_s[0])
    executor.enqueue_requests([ask("late", [1, 2], 150, deadline_s=1.0), ask("fine", [3], 20)])
    executor.start()
    engine.allow(20)
    chunks = collect(executor, {"fine"}, others={"late"})
    now_s[0] += 1.0
    engine.run_free()  # the steps that it may have been in
    late = [*chunks["late"], *collect(executor, {"late"})["late"]]
    assert late[-1].finish_reason == "timeout"
    assert ids(late) == oracle([1, 2], len(ids(late)))
    assert 20 <= len(ids(late)) <= 21
    assert ids(chunks["fine"]) == oracle([3], 20)
    assert is_idle(executor)
    executor.shutdown()


@pytest.mark.parametrize("is_serial", [True, False])
def test_held_tokens_are_told_at_the_end_whatever_ends_the_request(is_serial: bool) -> None:
    engine, now_s = SteppedEngine(VOCAB, 128, 4), [100.0]
    executor = make(128, engine, clock=lambda: now_s[0], disable_overlap_scheduler=is_serial)
    requests = [
        ask("late", [1, 2], 150, deadline_s=1.0, answer_every=64),
        ask("left", [5], 150, answer_every=64),
        ask("full", [4], 12, answer_every=64),
        ask("fine", [3], 20),
    ]
    executor.enqueue_requests(requests)
    executor.start()
    engine.allow(20)
    chunks = collect(executor, {"fine", "full"}, others={"late", "left"})
    assert [len(chunk.token_ids) for chunk in chunks["late"][:4]] == [1, 2, 4, 8]
    assert ids(chunks["full"]) == oracle([4], 12)
    assert len(chunks["full"]) == 4
    now_s[0] += 1.0
    executor.cancel_request("left")
    engine.run_free()  # the steps that they may have been in
    ended = collect(executor, {"late", "left"})
    late, left = ([*chunks[name], *ended[name]] for name in ("late", "left"))
    assert (late[-1].finish_reason, left[-1].finish_reason) == ("timeout", "cancelled")
    assert ids(late) == oracle([1, 2], len(ids(late)))
    assert ids(left) == oracle([5], len(ids(left)))
    assert min(len(ids(late)), len(ids(left))) >= 20
    assert is_idle(executor)
    executor.shutdown()


def test_a_deadline_wakes_an_idle_loop() -> None:
    times_s = iter([0.0, 0.0, 0.9, 1.0])  # of the put, of the first step, when the loop is idle, when it has waited
    inbox = Inbox(8, lambda: next(times_s))
    inbox.put(ask("late", [1], deadline_s=1.0))
    assert [request.request_id for request in inbox.gather(0, 0.0).arrivals] == ["late"]
    assert inbox.gather(0, idle_wait_s=10 * WAIT_S).expired == ["late"]


def test_a_deadline_ends_a_request_that_waits() -> None:
    executor = make(policy="STATIC_BATCH", max_batch_size=1, engine=(engine := SteppedEngine(VOCAB, 64, 4)))
    executor.enqueue_requests([ask("first", [1], 30), ask("second", [2], 30, deadline_s=0.1)])
    executor.start()
    time.sleep(0.2)
    engine.allow(2)
    chunks = collect(executor, {"second"}, others={"first"})
    assert (ids(chunks["second"]), chunks["second"][-1].finish_reason) == ([], "timeout")
    engine.run_free()
    assert ids([*chunks["first"], *collect(executor, {"first"})["first"]]) == oracle([1], 30)
    executor.shutdown()


def test_an_engine_error_reaches_everyone_and_later_callers() -> None:
    engine = SteppedEngine(VOCAB, 64, 4)
    executor = make(engine=engine)
    executor.start()
    executor.enqueue_requests([ask("a", [1], 100), ask("b", [2], 100)])
    engine.allow()
    wait_until(lambda: executor.await_responses(timeout_s=1.0))
    engine.fails = True
    engine.run_free()
    chunks = collect(executor, {"a", "b"})
    for name in ("a", "b"):
        error = chunks[name][-1].error
        assert isinstance(error, WorkerLost)
        assert "the engine broke" in error.message
    assert not executor.is_alive
    assert executor.await_responses(timeout_s=WAIT_S) == []
    with pytest.raises(WorkerLost):
        executor.enqueue_request(ask("c", [1]))


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ask("x", []), "prompt"),
        (ask("x", [1], 0), "max_tokens"),
        (ask("x", [1] * 250, 8), "max_tokens"),
        (ask("x", [1] * 300, 8), "prompt"),
        (ask("x", [1] * 5000, 8), "prompt"),
        (ask("x", [1, VOCAB]), "prompt"),
        (ask("x", [-1]), "prompt"),
    ],
)
def test_what_can_never_run_is_refused(executor: PyExecutor, request_: GenerateRequest, param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        executor.enqueue_request(request_)
    assert caught.value.param == param
    executor.enqueue_request(ask("ok", [5, 6]))
    assert ids(collect(executor, {"ok"})["ok"]) == oracle([5, 6], 8)


def test_the_queue_is_bounded_and_ids_are_unique() -> None:
    executor = make(max_requests=2)
    executor.enqueue_request(ask("a", [1]))
    with pytest.raises(ValueError, match="in use"):
        executor.enqueue_request(ask("a", [1]))
    executor.enqueue_request(ask("b", [1]))
    assert not executor.can_enqueue_requests()
    with pytest.raises(Overloaded) as caught:
        executor.enqueue_request(ask("c", [1]))
    assert caught.value.retry_after_s
    executor.start()
    collect(executor, {"a", "b"})
    executor.enqueue_request(ask("c", [1]))
    collect(executor, {"c"})
    executor.shutdown()


def test_awaiting_some_leaves_the_others(executor: PyExecutor) -> None:
    executor.enqueue_requests([ask("a", [1], 3), ask("b", [2], 3)])
    got: list[int] = []
    while len(got) < 3:
        got += ids(executor.await_responses({"a"}, timeout_s=5.0))
    assert got == oracle([1], 3)
    assert ids(collect(executor, {"b"})["b"]) == oracle([2], 3)
    assert executor.await_responses({"nobody"}, timeout_s=0.05) == []


def test_priorities_go_first() -> None:
    executor = make(policy="STATIC_BATCH", max_batch_size=1)
    executor.enqueue_requests([ask("low", [1], 4), ask("high", [2], 4, priority=5)])
    executor.start()
    order: list[str] = []
    while len(order) < 8:
        order += [chunk.request_id for chunk in executor.await_responses(timeout_s=5.0)]
    assert order == ["high"] * 4 + ["low"] * 4
    executor.shutdown()


def test_shutdown_ends_what_runs() -> None:
    engine = SteppedEngine(VOCAB, 64, 4)
    executor = make(engine=engine)
    executor.start()
    executor.enqueue_request(ask("a", [1], 200))
    engine.allow()
    wait_until(lambda: executor.await_responses(timeout_s=1.0))
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(executor.shutdown, WAIT_S)
        wait_until(lambda: not executor.can_enqueue_requests())
        engine.run_free()  # the steps that it may be in
        ending.result(WAIT_S)
    assert executor.await_responses(timeout_s=WAIT_S)[-1].finish_reason == "cancelled"
    with pytest.raises(NotReady):
        executor.enqueue_request(ask("b", [1]))


def test_statistics_have_the_known_keys(executor: PyExecutor) -> None:
    executor.enqueue_request(ask("a", list(range(10)), 5))
    collect(executor, {"a"})
    rows = executor.get_latest_iteration_stats()
    assert [row["iter"] for row in rows] == list(range(1, 6))
    assert rows[0]["inflightBatchingStats"]["numCtxTokens"] == 10
    assert rows[1]["inflightBatchingStats"]["numGenRequests"] == 1
    assert rows[-1]["numCompletedRequests"] == 1
    assert {"gpuMemUsage", "iterLatencyMS", "kvCacheStats"} <= rows[0].keys()
    assert executor.get_latest_iteration_stats() == []
    wait_until(lambda: executor.heartbeat() < 2.0)  # an idle loop agrees every 0.5 s


@pytest.mark.no_cover
def test_thousands_of_random_requests_all_end_right() -> None:
    rng = random.Random(3)
    executor = make(num_blocks=40, policy="MAX_UTILIZATION", max_batch_size=8, max_num_tokens=24, max_requests=4000)
    executor.start()
    prompts: dict[str, tuple[list[int], int]] = {}
    for i in range(1500):
        prompt = [rng.randrange(4) for _ in range(rng.randrange(1, 40))]
        prompts[f"r{i}"] = prompt, rng.randrange(1, 20)
        knobs = {"priority": rng.choice([0, 0, 0, 1]), "answer_every": rng.choice([1, 1, 4, 16])}
        executor.enqueue_request(ask(f"r{i}", prompt, prompts[f"r{i}"][1], **knobs))
        if rng.random() < 0.1:
            executor.cancel_request(f"r{rng.randrange(i + 1)}")
    chunks = collect(executor, set(prompts), timeout_s=4 * WAIT_S)
    for name, (prompt, max_tokens) in prompts.items():
        got = ids(chunks[name])
        assert got == oracle(prompt, max_tokens)[: len(got)]
        assert chunks[name][-1].finish_reason == ("length" if len(got) == max_tokens else "cancelled")
    assert is_idle(executor)
    executor.shutdown()
