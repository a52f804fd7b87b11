"""Statistics of the step loop: a bounded history of steps, and running totals for metrics.

The step loop records numbers only, when a step settles; the dicts of `get_stats` are made when they are taken. Keys are
those of TensorRT-LLM's iteration statistics; memory is in MB.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tensorweave.workers.executor.flight import Flight
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.step.speculation import DraftCounts

_MB = 1 << 20


class StepTimer:
    """Wall-clock marks of one iteration of the step loop, in seconds, and how many steps have settled in it.

    `forward_s` is the time in the engine: launching a step, and waiting for one to settle, which is `waited_s`. Under
    overlap the iteration waits for the step before the one that it launches. The rest of the iteration is the host's
    time.
    """

    __slots__ = ("_clock", "began_s", "forward_began_s", "forward_s", "num_settled", "waited_s")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.num_settled = 0
        self.begin()

    def begin(self) -> None:
        """The time before was idle, or is another record's."""
        self.began_s = self.forward_began_s = self._clock()
        self.forward_s = self.waited_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self.began_s

    def begin_forward(self) -> None:
        self.forward_began_s = self._clock()

    def end_forward(self) -> None:
        self.forward_s += self._clock() - self.forward_began_s

    def end_wait(self) -> None:
        waited_s = self._clock() - self.forward_began_s
        self.forward_s += waited_s
        self.waited_s += waited_s


@dataclass(slots=True)
class StepRecord:
    timestamp_s: float
    iteration: int
    step_s: float
    forward_s: float
    waited_s: float
    num_context: int
    num_generation: int
    num_context_tokens: int
    num_paused: int
    num_new: int
    new_waited_s: float
    num_active: int
    num_inside: int
    num_completed: int
    free_blocks: int
    used_blocks: int
    drafts: DraftCounts


class IterationStats:
    """At most `max_records` steps are kept for `take`; totals never forget."""

    def __init__(self, max_records: int, limits: Mapping[str, int], num_stages: int = 1) -> None:
        """`limits`: fields that are the same in every row. `num_stages`: of the pipeline, whose micro-batches are
        numbered."""
        self._limits = limits
        self._num_stages = num_stages
        self._records: collections.deque[StepRecord] = collections.deque(maxlen=max_records)
        self._lock = threading.Lock()
        self._iteration = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_preemptions = 0
        self._num_drafted = 0
        self._num_accepted = 0
        self._step_s = 0.0
        self._forward_s = 0.0
        self._kv: KVCache | None = None

    def add(
        self,
        timer: StepTimer,
        flight: Flight,
        kv: KVCache,
        drafts: DraftCounts,
        num_active: int,
        num_inside: int,
        num_completed: int,
    ) -> None:
        """A step has settled. The next record's time begins now."""
        batch = flight.batch
        self._kv = kv
        self._iteration += 1
        num_context_tokens, num_new, new_waited_s = 0, 0, 0.0
        for row in batch.context:
            num_context_tokens += row.length
            if _is_first(row):
                num_new += 1
                new_waited_s += flight.launched_s - row.request.arrival_s
        free_blocks = kv.available
        step_s = timer.elapsed_s
        self._num_prompt_tokens += num_context_tokens
        self._num_generated_tokens += len(batch.sampled) + drafts.num_accepted
        self._num_drafted += drafts.num_drafted
        self._num_accepted += drafts.num_accepted
        self._num_preemptions += len(batch.paused)
        self._step_s += step_s
        self._forward_s += timer.forward_s
        record = StepRecord(
            timestamp_s=time.time(),
            iteration=self._iteration,
            step_s=step_s,
            forward_s=timer.forward_s,
            waited_s=timer.waited_s,
            num_context=len(batch.context),
            num_generation=len(batch.generation),
            num_context_tokens=num_context_tokens,
            num_paused=len(batch.paused),
            num_new=num_new,
            new_waited_s=new_waited_s,
            num_active=num_active,
            num_inside=num_inside,
            num_completed=num_completed,
            free_blocks=free_blocks,
            used_blocks=kv.num_blocks - free_blocks,
            drafts=drafts,
        )
        with self._lock:
            self._records.append(record)
        timer.begin()

    def take(self) -> list[dict[str, Any]]:
        with self._lock:
            records = list(self._records)
            self._records.clear()
        if not records or self._kv is None:
            return []
        shared = {**self._limits, **_memory_mb()}
        kv_stats = self._kv.stats()
        return [_as_dict(record, shared, kv_stats, (record.iteration - 1) % self._num_stages) for record in records]

    def totals(self) -> dict[str, float]:
        return {
            "iterations_total": self._iteration,
            "step_seconds_total": self._step_s,
            "forward_seconds_total": self._forward_s,
            "computed_prompt_tokens_total": self._num_prompt_tokens,
            "generation_tokens_total": self._num_generated_tokens,
            "num_preemptions_total": self._num_preemptions,
            "draft_tokens_total": self._num_drafted,
            "accepted_draft_tokens_total": self._num_accepted,
        }


def step_limits(max_requests: int, max_batch_size: int, max_num_tokens: int) -> dict[str, int]:
    """The limits as the statistics report them. Nothing tunes them while it runs."""
    return {
        "maxNumActiveRequests": max_requests,
        "maxBatchSizeStatic": max_batch_size,
        "maxBatchSizeTunerRecommended": 0,
        "maxBatchSizeRuntime": max_batch_size,
        "maxNumTokensStatic": max_num_tokens,
        "maxNumTokensTunerRecommended": 0,
        "maxNumTokensRuntime": max_num_tokens,
    }


def _is_first(row: StepRow) -> bool:
    """Its request runs for the first time."""
    return row.start == row.request.num_cached_tokens and not row.request.num_preemptions


def _memory_mb() -> dict[str, float]:
    gpu_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    rss_bytes = psutil.Process().memory_info().rss
    return {"gpuMemUsage": gpu_bytes / _MB, "cpuMemUsage": rss_bytes / _MB, "pinnedMemUsage": 0.0}


def _as_dict(
    record: StepRecord, shared: Mapping[str, float], kv_stats: dict[str, float], micro_batch: int
) -> dict[str, Any]:
    num_scheduled = record.num_context + record.num_generation
    return {
        "timestamp": time.strftime("%m-%d-%Y %H:%M:%S", time.localtime(record.timestamp_s)),
        "iter": record.iteration,
        "iterLatencyMS": record.step_s * 1e3,
        "forwardLatencyMS": record.forward_s * 1e3,
        "waitLatencyMS": record.waited_s * 1e3,
        "hostLatencyMS": (record.step_s - record.waited_s) * 1e3,
        "newActiveRequestsQueueLatencyMS": record.new_waited_s * 1e3,
        "numNewActiveRequests": record.num_new,
        "numActiveRequests": record.num_active,
        "numQueuedRequests": max(0, record.num_inside + record.num_completed - num_scheduled),
        "numCompletedRequests": record.num_completed,
        **shared,
        "kvCacheStats": {**kv_stats, "freeNumBlocks": record.free_blocks, "usedNumBlocks": record.used_blocks},
        "inflightBatchingStats": {
            "numScheduledRequests": num_scheduled,
            "numContextRequests": record.num_context,
            "numGenRequests": record.num_generation,
            "numPausedRequests": record.num_paused,
            "numCtxTokens": record.num_context_tokens,
            "microBatchId": micro_batch,
            "avgNumDecodedTokensPerIter": _mean_decoded(record),
        },
        "staticBatchingStats": None,
        "specDecodingStats": _draft_stats(record) if record.drafts.num_requests else None,
    }


def _mean_decoded(record: StepRecord) -> float:
    return 1.0 + record.drafts.num_accepted / record.num_generation if record.num_generation else 0.0


def _draft_stats(record: StepRecord) -> dict[str, float]:
    num_requests, num_drafted, num_accepted, draft_s = record.drafts
    return {
        "numDraftTokens": num_drafted,
        "numAcceptedTokens": num_accepted,
        "numRequestsWithDraftTokens": num_requests,
        "acceptanceLength": 1.0 + num_accepted / num_requests,
        "iterLatencyMS": draft_s * 1e3,
        "draftOverhead": draft_s / record.step_s,
    }
