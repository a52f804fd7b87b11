"""`GuideAdmission`: rank 0 holds requests with a grammar until all ranks have compiled it.

    tried in a process of its own ─▶ compiled on every rank ─▶ its requests arrive
             │                              │
             └── refused, or too late ──────┴──▶ its requests end with that error

So a request that arrives in the step loop has its grammar on every rank, and all admit it in the same step.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

from tensorweave.cluster.errors import NotReady, Overloaded, RequestRejected, TensorweaveError
from tensorweave.cluster.guide import GUIDE_PARAM, Guide
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.guided.limits import (
    CACHE_BYTES,
    CACHE_GRAMMARS,
    MAX_TEXT_BYTES,
    NUM_TRIALS,
    QUEUE_TIMEOUT_S,
    READY_TIMEOUT_S,
)
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.guided.table import TOO_SLOW
from tensorweave.workers.guided.trial import TrialResult
from tensorweave.workers.step.hold import Put

logger = logging.getLogger(__name__)

_MAX_REFUSED: Final = 256


class GuideInbox(Protocol):
    """Of rank 0's `Inbox`."""

    def release(self, hold: bytes) -> None: ...

    def put_guide_order(self, order: GuideOrder) -> None: ...


class Trier(Protocol):
    def run(self, guide: Guide) -> TrialResult: ...


Refuse = Callable[[Guide, TensorweaveError], None]


@dataclass(slots=True)
class _Entry:
    """A guide that is ready, or will be. `missing` are the ranks that have not compiled it by the order with this
    number."""

    guide: Guide
    number: int
    missing: set[int]
    queued_s: float
    num_bytes: int = 0
    is_ready: bool = False
    is_over: threading.Event = field(default_factory=threading.Event)


class GuideAdmission:
    """For any thread.

    Args:
        size: Ranks of the gang.
        trials: Where guides are tried.
        inbox: Of the step loop.
        refuse: Ends the requests that are held for a guide with an error.
    """

    def __init__(
        self,
        size: int,
        trials: Trier,
        inbox: GuideInbox,
        refuse: Refuse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = size
        self._trials = trials
        self._inbox = inbox
        self._refuse = refuse
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._refused: collections.OrderedDict[bytes, TensorweaveError] = collections.OrderedDict()
        self._threads = ThreadPoolExecutor(NUM_TRIALS, thread_name_prefix="guide-admission")
        self._numbers = itertools.count(1)
        self._has_loaded = self._is_closed = False
        self.num_refused = 0

    @property
    def num_ready(self) -> int:
        with self._lock:
            return sum(entry.is_ready for entry in self._entries.values())

    def admit(self, request: GenerateRequest, put: Put) -> None:
        """Put a request with a guide into the inbox, where it arrives once its grammar is ready everywhere.

        Raises:
            RequestRejected: the guide is known to be wrong. What `put` raises.
        """
        guide = request.sampling.guide
        assert guide is not None
        if len(guide.text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise RequestRejected(f"the grammar's text is over the limit of {MAX_TEXT_BYTES} bytes", param=GUIDE_PARAM)
        digest = guide.digest
        with self._lock:
            if (refusal := self._refused.get(digest)) is not None:
                raise refusal.with_traceback(None)  # else each raise adds to it, and keeps that request
            entry = self._entries.get(digest)
            is_ready = entry is not None and entry.is_ready
            put(request, () if is_ready else (digest,))
            if entry is None:
                ranks = set(range(self._size))
                entry = self._entries[digest] = _Entry(guide, next(self._numbers), ranks, self._clock())
                self._begin(entry)
            self._entries.move_to_end(digest)

    def take_report(self, report: OrderReport) -> None:
        """A rank has compiled a guide, or could not."""
        with self._lock:
            entry = self._entries.get(report.digest)
            if entry is None or entry.is_ready or entry.number != report.number:
                return
            if report.problem:
                self._fail(entry, _refusal(report.problem))
                return
            entry.missing.discard(report.rank)
            if not entry.missing:
                entry.is_ready = True
                entry.is_over.set()
                self._inbox.release(entry.guide.digest)
                self._evict()

    def stop(self, digest: bytes) -> None:
        """End the requests with this grammar on all ranks, in the same step, and refuse those that come."""
        refusal = RequestRejected(TOO_SLOW, param=GUIDE_PARAM)
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None and not entry.is_ready:  # it was forgotten, and is compiled again
                self._fail(entry, refusal)
            else:
                self._entries.pop(digest, None)
                self._remember(digest, refusal)
                self.num_refused += 1
            self._inbox.put_guide_order(GuideOrder("stop", digest=digest))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for entry in list(self._entries.values()):
                if not entry.is_ready:
                    self._fail(entry, NotReady("the executor has been shut down"))
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, entry: _Entry) -> None:
        if not self._has_loaded:
            self._has_loaded = True
            self._inbox.put_guide_order(GuideOrder("load"))
        self._threads.submit(self._prepare, entry)

    def _prepare(self, entry: _Entry) -> None:
        """On a thread, until the guide is ready or refused."""
        try:
            if self._clock() - entry.queued_s > QUEUE_TIMEOUT_S:
                raise Overloaded("too many grammars wait to be compiled", retry_after_s=5.0)
            result = self._trials.run(entry.guide)
            if result.problem:
                raise _late(result.problem) if result.is_late else _refusal(result.problem)
            self._order(entry, result.num_bytes)
            if not entry.is_over.wait(READY_TIMEOUT_S):
                ranks = ", ".join(map(str, sorted(entry.missing)))
                raise _late(f"ranks {ranks} have not compiled it within {READY_TIMEOUT_S:g} s")
        except TensorweaveError as error:
            self._fail(entry, error)
        except Exception as error:  # the request's boundary: the process of the trials may not start
            logger.exception("a guide of kind %s was not tried", entry.guide.kind)
            self._fail(entry, _late(f"{type(error).__name__}: {error}"))

    def _order(self, entry: _Entry, num_bytes: int) -> None:
        with self._lock:
            if not entry.is_over.is_set():
                entry.num_bytes = num_bytes
                self._inbox.put_guide_order(GuideOrder("compile", entry.guide, number=entry.number))

    def _fail(self, entry: _Entry, error: TensorweaveError) -> None:
        with self._lock:
            if entry.is_over.is_set():
                return
            entry.is_over.set()
            digest = entry.guide.digest
            del self._entries[digest]
            self.num_refused += 1
            if isinstance(error, RequestRejected):
                self._remember(digest, error)
            if not self._is_closed:
                self._inbox.put_guide_order(GuideOrder("forget", digest=digest))
            self._refuse(entry.guide, error)

    def _remember(self, digest: bytes, refusal: RequestRejected) -> None:
        self._refused[digest] = refusal
        while len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)

    def _evict(self) -> None:
        """Let go of the grammars that were not asked for longest. Requests inside keep theirs."""
        ready = [entry for entry in self._entries.values() if entry.is_ready]
        num_bytes = sum(entry.num_bytes for entry in ready)
        for num_left, entry in zip(range(len(ready), 1, -1), ready, strict=False):
            if num_bytes <= CACHE_BYTES and num_left <= CACHE_GRAMMARS:
                return
            num_bytes -= entry.num_bytes
            del self._entries[entry.guide.digest]
            self._inbox.put_guide_order(GuideOrder("forget", digest=entry.guide.digest))


def _refusal(problem: str) -> RequestRejected:
    return RequestRejected(f"the grammar was refused: {problem}", param=GUIDE_PARAM)


def _late(problem: str) -> NotReady:
    return NotReady(f"the grammar is not ready: {problem}", param=GUIDE_PARAM, retry_after_s=5.0)
