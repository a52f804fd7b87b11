"""PyExecutor: one rank's executor, its step loop on a thread, and its mid-level API.

Rank 0 takes requests and answers them, the other ranks follow. Called by `workers.leader` (over sockets) and
`workers.executor.local` (in process).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError, WorkerLost
from tensorweave.cluster.protocol import (
    Adapter,
    GenerateRequest,
    KvEndpoint,
    KvSource,
    LinkMeasurement,
    ModelInfo,
    TokenChunk,
)
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.executor.admission import check_fits
from tensorweave.workers.executor.entrance import RequestEntrance
from tensorweave.workers.executor.inbox import FollowerInbox, Inbox
from tensorweave.workers.executor.iteration_stats import IterationStats
from tensorweave.workers.executor.logits_watch import LogitsWatch
from tensorweave.workers.executor.outbox import FollowerOutbox, Outbox
from tensorweave.workers.executor.scheduler import RequestScheduler
from tensorweave.workers.executor.step_loop import StepLoop
from tensorweave.workers.executor.turns import most_in_flight
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.guided.guides import Guides, NoGuides
from tensorweave.workers.lora.adapters import Adapters, NoAdapters
from tensorweave.workers.sampling.decoder import Decoder
from tensorweave.workers.sampling.logits_processors import BatchedLogitsProcessor, LogitsProcessor
from tensorweave.workers.step.kv_exchange import NoTransfers, Transfers
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.speculation import NoSpeculation, Speculation

logger = logging.getLogger(__name__)


class PyExecutor:
    """Runs requests to their end over one model engine.

    Thread-safe outside; the loop runs on a thread of its own from `start` to `shutdown`. Only rank 0 may enqueue, await
    and cancel. With `disable_overlap_scheduler` off, a step is launched before the one before it has settled; pipeline
    stages have as many steps in flight besides. Deadlines are read on `clock`.
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
        guides: Guides | None = None,
        adapters: Adapters | None = None,
        speculation: Speculation | None = None,
        disable_overlap_scheduler: bool = True,
        max_requests: int = 1024,
        max_stats: int = 1000,
        stats_limits: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.comm = comm
        self.failure: TensorweaveError | None = None
        self._engine = engine
        self._scheduler = scheduler
        self._resources = resources
        self._decoder = decoder
        self._transfers = transfers or NoTransfers()
        guides = guides or NoGuides()
        self._adapters = adapters or NoAdapters()
        is_leader = comm.rank == 0
        self._inbox: Inbox | FollowerInbox = Inbox(max_requests, clock) if is_leader else FollowerInbox()
        self._outbox: Outbox | FollowerOutbox = Outbox() if is_leader else FollowerOutbox()
        self._entrance = RequestEntrance(self._inbox, self._outbox, self._transfers, guides, self._adapters)
        self._watch = LogitsWatch(info, comm.rank)
        self._stats = IterationStats(max_stats, stats_limits or {}, comm.place.mesh.pipeline)
        self._loop = StepLoop(
            engine=engine,
            scheduler=scheduler,
            resources=resources,
            decoder=decoder,
            comm=comm,
            transfers=self._transfers,
            guides=guides,
            adapters=self._adapters,
            speculation=NoSpeculation() if speculation is None else speculation,
            inbox=self._inbox,
            outbox=self._outbox,
            watch=self._watch,
            stats=self._stats,
            depth=most_in_flight(comm.place.mesh, overlaps=not disable_overlap_scheduler) - 1,
        )
        self._broken_by: BaseException | None = None
        self._progress_s = time.monotonic()
        self._seen_progress = 0
        self._thread = threading.Thread(target=self._run, name=f"py-executor-{comm.rank}", daemon=True)

    # ---- the mid-level API

    def start(self) -> None:
        self._transfers.start(self._inbox)
        self._entrance.start()
        self._progress_s = time.monotonic()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs: it was started, has not been shut down and has not failed."""
        return self._thread.is_alive() and self.failure is None

    @property
    def kv_endpoint(self) -> KvEndpoint | None:
        """Where other gangs fetch KV from this rank; None if it exchanges none."""
        return self._transfers.endpoint

    @property
    def kv_fingerprint(self) -> dict[str, str]:
        """What another gang must have alike to take KV from here, or to give it."""
        return self._transfers.fingerprint

    def measure_link(self, source: KvSource, timeout_s: float = 10.0) -> LinkMeasurement:
        """What the way from a giving gang to this rank carries."""
        return self._transfers.measure_link(source, timeout_s)

    def wait_released(self, timeout_s: float) -> bool:
        """Wait until no lease is open. Return whether that happened within `timeout_s`."""
        return self._transfers.wait_released(timeout_s)

    def heartbeat(self) -> float:
        """Seconds since the loop, or the engine within a step, was last seen to make progress; grows without bound when
        a step hangs. Look about once a second."""
        if (progress := self._engine.progress) != self._seen_progress:
            self._seen_progress, self._progress_s = progress, time.monotonic()
        return time.monotonic() - self._progress_s

    @property
    def waits_for_stage(self) -> bool:
        """Whether another pipeline stage is waited for now: then that one's progress counts, not the one here."""
        return self.comm.stages.is_waiting

    def can_enqueue_requests(self) -> bool:
        return self._inbox.has_room

    def expect_requests(self, num_requests: int) -> None:
        """So many requests are about to be enqueued: if the loop is idle, they begin in the same step, unless enqueuing
        takes longer than a few milliseconds."""
        self._inbox.expect(num_requests)

    def enqueue_request(self, request: GenerateRequest) -> str:
        """Hand a request to the loop; its chunks come through `await_responses`.

        Raises:
            RequestRejected: the request can never run here; `param` names the field.
            Overloaded: as many requests are inside as may be.
            NotReady: shutting down. WorkerLost: the loop has failed.
        """
        try:
            check_fits(request, self.info)
            self._decoder.processors.check(request.sampling)
            self._check_schedulable(request)
            self._entrance.put(request)
        except TensorweaveError:
            if request.offer is not None:
                self._transfers.decline(request.offer)
            raise
        return request.request_id

    def load_adapter(self, name: str, path: str) -> Adapter:
        """Read a PEFT directory, and return once all ranks have it in memory. Not for the step loop's thread.

        Raises:
            RequestRejected: it is wrong; the message says what. NotReady: it was not loaded in time.
        """
        return self._adapters.load(name, path)

    def _check_schedulable(self, request: GenerateRequest) -> None:
        """A user's scheduler may raise what it likes: of one request, and on the thread that serves them all."""
        try:
            self._scheduler.check(len(request.prompt_token_ids) - request.num_replayed, request.sampling.max_tokens)
        except TensorweaveError:
            raise
        except BaseException as error:  # the request's boundary
            raise RequestRejected(f"the scheduler's check raised {type(error).__name__}: {error}") from error

    def enqueue_requests(self, requests: Sequence[GenerateRequest]) -> list[str]:
        """Enqueue all of them. If one is refused, raise its error; those before it are enqueued."""
        return [self.enqueue_request(request) for request in requests]

    def await_responses(
        self, request_ids: Collection[str] | None = None, timeout_s: float | None = None
    ) -> list[TokenChunk]:
        """Take the chunks since the last call (of these requests, or of all). If there is none, wait up to `timeout_s`
        seconds for one."""
        return self._outbox.take(timeout_s) if request_ids is None else self._outbox.take_of(request_ids, timeout_s)

    def cancel_request(self, request_id: str) -> bool:
        """End a request: its last chunk says 'cancelled' within a step, and its blocks are free once the launched steps
        that hold it have settled. Of one that has ended on offer, the lease ends. False where it is neither."""
        return self._inbox.cancel(request_id) or self._transfers.give_up(request_id)

    def set_logits_processor(self, name: str, processor: LogitsProcessor | None) -> None:
        """Set what edits the logits of requests that name it; None removes it. Call this on every rank."""
        self._decoder.processors.set(name, processor)

    def set_batched_logits_processor(self, processor: BatchedLogitsProcessor | None) -> None:
        """The same for all requests with `uses_batched_processor`, in one call per step."""
        self._decoder.processors.set_batched(processor)

    def get_latest_iteration_stats(self) -> list[dict[str, Any]]:
        """Take one dict per step since the last call, oldest first. The keys are those of TensorRT-LLM's iteration
        stats."""
        return self._stats.take()

    def get_latest_kv_cache_events(self) -> list[dict[str, Any]]:
        """Take the KV events since the last call; empty unless the KV manager keeps them."""
        try:
            return self._resources.kv_cache.take_events()
        except BaseException as error:  # a user's KV manager ends the step loop, not the thread that asks for all
            self._broken_by = error
            return []

    @property
    def num_requests(self) -> int:
        """Requests that wait or run here."""
        return self._inbox.num_inside

    def gauges(self) -> dict[str, float]:
        """Values for a metrics endpoint."""
        kv = self._resources.kv_cache
        running = sum(request.is_started for request in self._loop.requests)
        waiting = max(0, self.num_requests - running)
        total = max(1, self.info.num_blocks)
        return {
            "num_requests_running": running,
            "num_requests_waiting": waiting,
            "kv_cache_usage_perc": 1.0 - kv.available / total,
            "kv_blocks": self.info.num_blocks,
            "kv_blocks_used": self.info.num_blocks - kv.available,
            "kv_blocks_cached": kv.stats().get("cachedNumBlocks", 0.0),
            **self._stats.totals(),
            "requests_not_finite_total": self._watch.num_failed,
            **self._transfers.gauges(),
            **self.comm.stages.gauges(),
            **self._entrance.gauges(),
        }

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """End the loop on every rank (running requests end as cancelled) and free its resources. Raises
        TimeoutError."""
        self._inbox.shut_down()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the step loop did not end within {timeout_s} s")

    # ---- the loop's thread

    def _run(self) -> None:
        try:
            while self._step():
                self._progress_s = time.monotonic()
            self._loop.end(NotReady("the executor has been shut down"))
            self._entrance.close()
            self._transfers.shutdown()
            self._resources.shutdown()
        except BaseException as error:  # the loop's boundary: whatever happened, everyone who waits must hear of it
            self._fail(error)
        finally:
            self._outbox.close()

    def _step(self) -> bool:
        if self._broken_by is not None:
            raise WorkerLost(f"the KV cache manager failed: {self._broken_by!r}") from self._broken_by
        return self._loop.step()

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, TensorweaveError):
            logger.exception("rank %d: the step loop failed", self.comm.rank)
            error = WorkerLost(f"the step loop failed: {type(error).__name__}: {error}")
        else:
            logger.error("rank %d: the step loop ends: %s", self.comm.rank, error)
        self.failure = error
        self._transfers.shutdown()
        self._loop.answer()
        orphans = self._inbox.close(error)
        self._outbox.put([TokenChunk(request_id, error=error) for request_id in orphans])
        self._entrance.close()
