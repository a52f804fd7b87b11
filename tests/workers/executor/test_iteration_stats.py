"""The rows of `get_stats`: TensorRT-LLM's keys, and numbers that follow from the steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.flight import Flight
from tensorweave.workers.executor.iteration_stats import IterationStats, StepTimer, step_limits
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import HashEngine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.speculation import NO_DRAFTS

PATIENCE_S = 60.0
KEYS = (
    "timestamp iter iterLatencyMS newActiveRequestsQueueLatencyMS numNewActiveRequests numActiveRequests "
    "numQueuedRequests numCompletedRequests maxNumActiveRequests maxBatchSizeStatic maxBatchSizeTunerRecommended "
    "maxBatchSizeRuntime maxNumTokensStatic maxNumTokensTunerRecommended maxNumTokensRuntime gpuMemUsage cpuMemUsage "
    "pinnedMemUsage kvCacheStats staticBatchingStats inflightBatchingStats specDecodingStats"
)
KV_KEYS = (
    "maxNumBlocks freeNumBlocks usedNumBlocks tokensPerBlock allocTotalBlocks allocNewBlocks reusedBlocks missedBlocks "
    "cacheHitRate"
)
INFLIGHT_KEYS = (
    "numScheduledRequests numContextRequests numGenRequests numPausedRequests numCtxTokens microBatchId "
    "avgNumDecodedTokensPerIter"
)


def rows_of(requests: list[GenerateRequest], *, max_batch_size: int, max_num_tokens: int = 64) -> list[dict[str, Any]]:
    """All requests are there before the first step."""
    engine = HashEngine()
    kv_cache = KVCacheManager(num_blocks=engine.info.num_blocks, tokens_per_block=engine.info.tokens_per_block)
    decoder = SamplingDecoder()
    executor = PyExecutor(
        engine=engine,
        scheduler=SimpleScheduler(kv_cache, max_batch_size=max_batch_size, max_num_tokens=max_num_tokens),
        resources=ResourceManager([decoder.states, kv_cache]),
        decoder=decoder,
        comm=SoloComm(),
        info=engine.info,
        stats_limits=step_limits(7, max_batch_size, max_num_tokens),
    )
    executor.enqueue_requests(requests)
    executor.start()
    try:
        num_open = len(requests)
        while num_open:
            num_open -= sum(chunk.is_last for chunk in executor.await_responses(timeout_s=PATIENCE_S))
    finally:
        executor.shutdown(PATIENCE_S)
    return executor.get_latest_iteration_stats()


def test_every_key_is_there() -> None:
    rows = rows_of([GenerateRequest("a", [1, 2, 3], SamplingSpec(2))], max_batch_size=4)
    assert len(rows) == 2
    for row in rows:
        assert row.keys() >= set(KEYS.split())
        assert row["kvCacheStats"].keys() >= set(KV_KEYS.split())
        assert row["inflightBatchingStats"].keys() >= set(INFLIGHT_KEYS.split())
        limits = [row[key] for key in ("maxNumActiveRequests", "maxBatchSizeRuntime", "maxNumTokensRuntime")]
        assert limits == [7, 4, 64]
        assert 0 <= row["waitLatencyMS"] <= row["forwardLatencyMS"] <= row["iterLatencyMS"]
        assert row["hostLatencyMS"] == pytest.approx(row["iterLatencyMS"] - row["waitLatencyMS"])


def test_who_waits_and_who_is_new() -> None:
    """Three requests of two tokens, one at a time."""
    requests = [GenerateRequest(name, [ord(name)] * 5, SamplingSpec(2)) for name in "abc"]
    rows = rows_of(requests, max_batch_size=1)
    assert [row["numNewActiveRequests"] for row in rows] == [1, 0, 1, 0, 1, 0]
    assert [row["numQueuedRequests"] for row in rows] == [2, 2, 1, 1, 0, 0]
    assert [row["numCompletedRequests"] for row in rows] == [0, 1, 0, 1, 0, 1]
    waits = [row["newActiveRequestsQueueLatencyMS"] for row in rows]
    assert [wait > 0 for wait in waits] == [False, False, True, False, True, False]
    assert waits[4] > waits[2]


def test_a_prompt_in_chunks_is_new_once() -> None:
    rows = rows_of([GenerateRequest("a", list(range(100)), SamplingSpec(1))], max_batch_size=4, max_num_tokens=32)
    assert [row["numNewActiveRequests"] for row in rows] == [1, *[0] * (len(rows) - 1)]
    assert len(rows) == 4
    assert [row["inflightBatchingStats"]["numCtxTokens"] for row in rows] == [32, 32, 32, 4]


def test_a_pipelines_micro_batches_have_numbers() -> None:
    stats, kv_cache = IterationStats(8, {}, num_stages=3), KVCacheManager(4, 4)
    for _ in range(4):
        stats.add(StepTimer(), Flight(ScheduledBatch(), 0.0), kv_cache, NO_DRAFTS, 0, 0, 0)
    assert [row["inflightBatchingStats"]["microBatchId"] for row in stats.take()] == [0, 1, 2, 0]


def test_no_time_is_counted_twice_when_two_steps_settle_in_one_iteration() -> None:
    now_s = [100.0]
    timer, stats, kv_cache = StepTimer(lambda: now_s[0]), IterationStats(8, {}), KVCacheManager(4, 4)
    for host_s, wait_s in ((1.0, 5.0), (0.5, 2.0)):
        now_s[0] += host_s
        timer.begin_forward()
        now_s[0] += wait_s
        timer.end_wait()
        stats.add(timer, Flight(ScheduledBatch(), 0.0), kv_cache, NO_DRAFTS, 0, 0, 0)
    assert [(row["iterLatencyMS"], row["hostLatencyMS"]) for row in stats.take()] == [(6e3, 1e3), (2.5e3, 0.5e3)]
    assert stats.totals()["step_seconds_total"] == 8.5
    assert stats.totals()["forward_seconds_total"] == 7.0


def test_the_wait_for_a_step_is_part_of_the_time_in_the_engine() -> None:
    """The clock advances by a second per reading."""
    ticks = itertools.count()
    timer = StepTimer(lambda: float(next(ticks)))
    timer.begin_forward()
    timer.end_forward()
    timer.begin_forward()
    timer.end_wait()
    assert (timer.forward_s, timer.waited_s) == (2.0, 1.0)
