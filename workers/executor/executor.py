"""PyExecutor: the step loop that every rank of a gang runs, and its mid-level API.

One loop serves every feature; each line of a step is a verb that something else owns. Rank 0 takes requests and answers
them, the other ranks follow through `Comm.agree`. Called by `workers.leader` (over sockets) and `workers.local` (in
process).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorweave.cluster.errors import LogitsNotFinite, NotReady, RequestRejected, TensorweaveError, WorkerLost
from tensorweave.cluster.protocol import (
    FinishReason,
    GenerateRequest,
    KvEndpoint,
    KvSource,
    LinkMeasurement,
    ModelInfo,
    TokenChunk,
)
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.executor.admission import check_fits
from tensorweave.workers.executor.bookkeeping import Settled, book_launch, book_result, checksum
from tensorweave.workers.executor.inbox import FollowerInbox, Inbox, StepInput
from tensorweave.workers.executor.iteration_stats import IterationStats, StepTimer
from tensorweave.workers.executor.logits_watch import LogitsWatch
from tensorweave.workers.executor.outbox import FollowerOutbox, Outbox
from tensorweave.workers.executor.scheduler import RequestScheduler
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.sampling.decoder import Decoder
from tensorweave.workers.sampling.logits_processors import BatchedLogitsProcessor, LogitsProcessor
from tensorweave.workers.sampling.logprobs import read_prompts
from tensorweave.workers.step.kv_exchange import KvArrived, NoTransfers, Transfers
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.result import StepResult

logger = logging.getLogger(__name__)

# An idle rank 0 agrees on empty news this often, so that idle followers know it alive.
IDLE_BEAT_S = 0.5


class PyExecutor:
    """Runs requests to their end over one model engine.

    Thread-safe outside; the loop runs on a thread of its own from `start` to `shutdown`. Only rank 0 may enqueue, await
    and cancel. `engine_progress` gives a number that grows while a step computes, however long that takes.
    """

    def __init__(
        self,
        *,
        engine: ModelEngine,
        scheduler: RequestScheduler,
        resources: ResourceManager,
        decoder: Decoder,
        comm: Comm,
        info: ModelInfo,
        transfers: Transfers | None = None,
        engine_progress: Callable[[], int] = lambda: 0,
        max_requests: int = 1024,
        max_stats: int = 1000,
        stats_limits: Mapping[str, int] | None = None,
    ) -> None:
        self.info = info
        self.comm = comm
        self.failure: TensorweaveError | None = None
        self._engine = engine
        self._scheduler = scheduler
        self._resources = resources
        self._decoder = decoder
        self._transfers = transfers or NoTransfers()
        self._inbox: Inbox | FollowerInbox = Inbox(max_requests) if comm.rank == 0 else FollowerInbox()
        self._outbox: Outbox | FollowerOutbox = Outbox() if comm.rank == 0 else FollowerOutbox()
        self._active: list[LlmRequest] = []
        self._by_id: dict[str, LlmRequest] = {}
        self._num_arrived = 0
        self._has_priorities = False
        self._is_stuck = False
        self._broken_by: BaseException | None = None
        self._token_check = 0
        self._answers: list[TokenChunk] = []
        self._watch = LogitsWatch(info, comm.rank)
        self._stats = IterationStats(max_stats, stats_limits or {})
        self._progress_s = time.monotonic()
        self._engine_progress = engine_progress
        self._seen_progress = 0
        self._thread = threading.Thread(target=self._run, name=f"py-executor-{comm.rank}", daemon=True)

    # ---- the mid-level API

    def start(self) -> None:
        self._transfers.start(self._inbox)
        self._progress_s = time.monotonic()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """The loop runs: it was started, has not been shut down and has not failed."""
        return self._thread.is_alive() and self.failure is None

    @property
    def kv_endpoint(self) -> KvEndpoint | None:
        """Where this rank gives its KV away; None where it exchanges none."""
        return self._transfers.endpoint

    @property
    def kv_fingerprint(self) -> dict[str, str]:
        """What another gang must have alike to take KV from here, or to give it."""
        return self._transfers.fingerprint

    def measure_link(self, source: KvSource, timeout_s: float = 10.0) -> LinkMeasurement:
        """What the way from a giving gang to this rank carries."""
        return self._transfers.measure_link(source, timeout_s)

    def wait_released(self, timeout_s: float) -> bool:
        """Until nobody holds a claim on KV of requests that have ended here; whether that is so in time."""
        return self._transfers.wait_released(timeout_s)

    def heartbeat(self) -> float:
        """Seconds since the loop, or the engine within a step, was last seen to make progress; grows without bound when
        a step hangs. Look about once a second."""
        if (progress := self._engine_progress()) != self._seen_progress:
            self._seen_progress, self._progress_s = progress, time.monotonic()
        return time.monotonic() - self._progress_s

    def can_enqueue_requests(self) -> bool:
        return isinstance(self._inbox, Inbox) and self._inbox.has_room

    def enqueue_request(self, request: GenerateRequest) -> str:
        """Hand a request to the loop; its chunks come through `await_responses`.

        Raises:
            RequestRejected: the request can never run here; `param` names the field.
            Overloaded: as many requests are inside as may be.
            NotReady: shutting down. WorkerLost: the loop has failed.
        """
        inbox = self._leader_inbox()
        try:
            check_fits(request, self.info)
            self._decoder.processors.check(request.sampling)
            self._check_schedulable(request)
            inbox.put(request)
        except TensorweaveError:
            if request.offer is not None:
                self._transfers.decline(request.offer)
            raise
        return request.request_id

    def _check_schedulable(self, request: GenerateRequest) -> None:
        """A user's scheduler may raise what it likes: of one request, and on the thread that serves them all."""
        try:
            self._scheduler.check(len(request.prompt_token_ids) - request.num_replayed, request.sampling.max_tokens)
        except TensorweaveError:
            raise
        except BaseException as error:  # the request's boundary
            raise RequestRejected(f"the scheduler's check raised {type(error).__name__}: {error}") from error

    def enqueue_requests(self, requests: Sequence[GenerateRequest]) -> list[str]:
        """All of them, or, where one is refused, its error and those before it enqueued."""
        return [self.enqueue_request(request) for request in requests]

    def await_responses(
        self, request_ids: Collection[str] | None = None, timeout_s: float | None = None
    ) -> list[TokenChunk]:
        """Chunks since the last call (of these requests, or of all); waits for one, at most `timeout_s` seconds."""
        assert isinstance(self._outbox, Outbox), "only rank 0 answers"
        return self._outbox.take(timeout_s) if request_ids is None else self._outbox.take_of(request_ids, timeout_s)

    def cancel_request(self, request_id: str) -> bool:
        """Its blocks are free within a step, and its last chunk says 'cancelled'; of one that has ended on offer, the
        lease ends. False where it is not inside."""
        return self._leader_inbox().cancel(request_id) or self._transfers.give_up(request_id)

    def set_logits_processor(self, name: str, processor: LogitsProcessor | None) -> None:
        """What requests that name it have their logits edited by; None takes it away. Every rank must be told."""
        self._decoder.processors.set(name, processor)

    def set_batched_logits_processor(self, processor: BatchedLogitsProcessor | None) -> None:
        """The same for all requests with `uses_batched_processor`, in one call a step."""
        self._decoder.processors.set_batched(processor)

    def get_latest_iteration_stats(self) -> list[dict[str, Any]]:
        """One dict per step since the last call, oldest first; the keys are those of TensorRT-LLM's iteration stats."""
        return self._stats.take()

    def get_latest_kv_cache_events(self) -> list[dict[str, Any]]:
        """KV events since the last call; empty unless the KV manager keeps them."""
        try:
            return self._resources.kv_cache.take_events()
        except BaseException as error:  # a user's KV manager ends the step loop, not the thread that asks for all
            self._broken_by = error
            return []

    @property
    def num_requests(self) -> int:
        """Requests inside, waiting or running."""
        return self._inbox.num_inside

    def gauges(self) -> dict[str, float]:
        """What a metrics endpoint shows of this executor now."""
        kv = self._resources.kv_cache
        running = sum(request.is_started for request in tuple(self._active))
        waiting = max(0, self.num_requests - running)
        total = max(1, self.info.num_blocks)
        return {
            "num_requests_running": running,
            "num_requests_waiting": waiting,
            "kv_cache_usage_perc": 1.0 - kv.available / total,
            **self._stats.totals(),
            "requests_not_finite_total": self._watch.num_failed,
            **self._transfers.gauges(),
        }

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """End the loop on every rank (running requests end as cancelled) and free its resources. Raises
        TimeoutError."""
        self._inbox.shut_down()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the step loop did not end within {timeout_s} s")

    # ---- the loop

    def _run(self) -> None:
        try:
            while self._step():
                self._progress_s = time.monotonic()
            self._end_all("cancelled")
            late = self._inbox.close(NotReady("the executor has been shut down"))
            self._answers += [TokenChunk(request_id, finish_reason="cancelled") for request_id in late]
            self._answer()
            self._transfers.shutdown()
            self._resources.shutdown()
        except BaseException as error:  # the loop's boundary: whatever happened, everyone who waits must hear of it
            self._fail(error)
        finally:
            self._outbox.close()

    def _step(self) -> bool:
        """One iteration; False when the ranks have agreed to end."""
        if self._broken_by is not None:
            raise WorkerLost(f"the KV cache manager failed: {self._broken_by!r}") from self._broken_by
        timer = StepTimer()
        news = self._agree()
        self._admit(news)
        if news.is_shutdown:
            return False
        batch = self._scheduler.schedule_request(self._active)
        self._pause(batch)
        self._resources.prepare_resources(batch)
        self._fetch(batch)
        settled = self._settle(batch, self._compute(batch, timer))
        num_inside, num_ended = self._inbox.num_inside, len(settled.ended)
        self._stats.add(timer, batch, self._active, self._resources.kv_cache, num_inside, num_ended)
        self._is_stuck = batch.is_empty and bool(self._active)
        self._answer()
        return True

    def _compute(self, batch: ScheduledBatch, timer: StepTimer) -> StepResult:
        if batch.is_empty:
            return StepResult()
        timer.begin_forward()
        logits = self._engine.forward(batch, self._resources)
        prompts = read_prompts(self._engine.prompt_logits(batch))
        timer.end_forward()
        book_launch(batch)
        return replace(self._decoder.decode(logits, batch), prompts=prompts)

    def _settle(self, batch: ScheduledBatch, result: StepResult) -> Settled:
        settled = book_result(batch, result)
        self._answers += settled.chunks
        self._resources.update_resources(batch)
        for request in settled.truncated:
            self._resources.truncate(request, request.num_computed)
        self._transfers.offer(settled.context)
        self._watch.note(settled.num_sampled, settled.ended)
        if self.comm.size > 1:
            self._token_check = checksum(result, self._token_check)
        self._free(settled.ended)
        return settled

    def _agree(self) -> StepInput:
        wait_s = 0.0 if self._active and not self._is_stuck else IDLE_BEAT_S
        mine = self._inbox.gather(self._token_check, wait_s)
        if mine is not None and self.comm.size == 1:
            return mine
        news = StepInput.unpack(self.comm.agree(None if mine is None else mine.pack()))
        if news.token_check != self._token_check:
            raise WorkerLost(f"rank {self.comm.rank} has sampled other tokens than rank 0: the gang has diverged")
        return news

    def _admit(self, news: StepInput) -> None:
        self._resources.kv_cache.now_s = news.now_s
        for probe in self._watch.start_probes(self._num_arrived, news.now_s):
            self._num_arrived += 1
            self._by_id[probe.request_id] = probe
            self._active.append(probe)
        for arrival in news.arrivals:
            self._num_arrived += 1
            request = LlmRequest.of(arrival, self._num_arrived, news.now_s, can_fetch=self._transfers.can_fetch)
            self._by_id[request.request_id] = request
            self._active.append(request)
        if any(arrival.priority for arrival in news.arrivals) or self._has_priorities:
            self._has_priorities = True
            self._active.sort(key=lambda request: (-request.priority, request.order))
        for request_id in news.cancelled:
            self._end_early(request_id, "cancelled")
        for request_id in news.expired:
            self._end_early(request_id, "timeout")
        for arrived in news.arrived:
            self._land(arrived)
        for request_id in news.released:
            self._release(request_id)

    def _land(self, arrived: KvArrived) -> None:
        """A request's KV has come from elsewhere: go on as if it had been computed here, up to where it is right."""
        request = self._by_id.get(arrived.request_id)
        if request is None or request.state is not RequestState.FETCHING:
            return
        self._transfers.drop(request)
        chunk = request.resume(arrived.num_tokens, arrived.first_token, arrived.extras)
        self._resources.store_computed(request)
        if chunk is not None:
            self._answers.append(chunk)
            self._free([request] if request.finish_reason is not None else [])

    def _release(self, request_id: str) -> None:
        request = self._transfers.release(request_id)
        if request is not None:
            self._resources.free_resources(request)

    def _fetch(self, batch: ScheduledBatch) -> None:
        for request, start, *_ in batch.fetching:
            request.state = RequestState.FETCHING
            request.num_computed = request.num_launched = start
        self._transfers.fetch(batch.fetching)

    def _pause(self, batch: ScheduledBatch) -> None:
        for request in batch.paused:
            self._transfers.drop(request)
            self._resources.free_resources(request)
            request.pause()

    def _free(self, finished: Sequence[LlmRequest]) -> None:
        for request in finished:
            self._forget(request)
        if finished:
            self._active = [request for request in self._active if request.finish_reason is None]

    def _forget(self, request: LlmRequest) -> None:
        if not self._transfers.keeps(request):
            if isinstance(request.failure, LogitsNotFinite):
                self._engine.wipe_blocks(self._resources.discard_resources(request))
            else:
                self._resources.free_resources(request)
        request.state = RequestState.DONE
        del self._by_id[request.request_id]
        self._inbox.forget(request.request_id)

    def _end_early(self, request_id: str, reason: FinishReason) -> None:
        request = self._by_id.get(request_id)
        if request is None:
            return
        request.finish_reason = reason
        self._forget(request)
        self._active.remove(request)
        self._answers.append(
            TokenChunk(request_id, (), reason, num_cached_tokens=request.num_cached_tokens, start=request.num_output),
        )

    def _end_all(self, reason: FinishReason) -> None:
        for request_id in list(self._by_id):
            self._end_early(request_id, reason)

    def _answer(self) -> None:
        if self._answers:
            self._outbox.put(self._watch.without_probes(self._answers))
            self._answers = []

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, TensorweaveError):
            logger.exception("rank %d: the step loop failed", self.comm.rank)
            error = WorkerLost(f"the step loop failed: {type(error).__name__}: {error}")
        else:
            logger.error("rank %d: the step loop ends: %s", self.comm.rank, error)
        self.failure = error
        self._transfers.shutdown()
        self._answer()
        orphans = self._inbox.close(error)
        self._outbox.put([TokenChunk(request_id, error=error) for request_id in orphans])

    def _leader_inbox(self) -> Inbox:
        assert isinstance(self._inbox, Inbox), "only rank 0 takes requests"
        return self._inbox
