"""`AdapterAdmission`: rank 0 holds requests with an adapter until all ranks have it in memory.

    waits for room ──▶ loaded on every rank ──▶ its requests arrive ──▶ idle once they end ──▶ out, if room is needed
                             │
                             └── refused, or too late ──▶ its requests end with that error

So a request that arrives in the step loop has its adapter on every rank, and all admit it in the same step. At most
`capacity` adapters are in memory or being loaded. One that a request uses stays; the others go, the one that was asked
for longest ago first.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Protocol

from tensorweave.cluster.adapter import ADAPTER_PARAM, Adapter
from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.lora.orders import AdapterOrder
from tensorweave.workers.step.hold import Put

LOAD_TIMEOUT_S: Final = 120.0
_PREFIX: Final = b"adapter:"


class AdapterInbox(Protocol):
    """What admission needs of rank 0's `Inbox`."""

    def put(self, request: GenerateRequest, holds: Collection[bytes] = ()) -> None: ...

    def hold(self, request: GenerateRequest, holds: Collection[bytes]) -> None: ...

    def held_for(self, hold: bytes) -> list[GenerateRequest]: ...

    def release(self, hold: bytes) -> None: ...

    def put_adapter_order(self, order: AdapterOrder) -> None: ...


class Entrance(Protocol):
    """What admission needs of the executor."""

    def enter(self, request: GenerateRequest, put: Put) -> None:
        """What else a request must wait for once its adapter is there. Raises TensorweaveError."""

    def refuse(self, hold: bytes, error: TensorweaveError) -> None:
        """End the requests that wait for this."""

    def refuse_one(self, request: GenerateRequest, error: TensorweaveError) -> None:
        """End this request if it still waits."""


@dataclass(slots=True)
class _Entry:
    """An adapter that is in memory, or will be. `missing` are the ranks that have not loaded it by the order with this
    number; `users` are the ids of the requests that have not ended."""

    adapter: Adapter
    number: int
    missing: set[int]
    users: set[str] = field(default_factory=set)
    is_ordered: bool = False
    is_ready: bool = False
    error: TensorweaveError | None = None
    is_over: threading.Event = field(default_factory=threading.Event)
    timer: threading.Timer | None = None

    @property
    def hold(self) -> bytes:
        return _PREFIX + self.adapter.digest


class AdapterAdmission:
    """For any thread."""

    def __init__(
        self, size: int, capacity: int, inbox: AdapterInbox, entrance: Entrance, timeout_s: float = LOAD_TIMEOUT_S
    ) -> None:
        self._size = size
        self._capacity = capacity
        self._inbox = inbox
        self._entrance = entrance
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._numbers = itertools.count(1)
        self._is_closed = False
        self.num_loads = self.num_failed = 0

    @property
    def num_ready(self) -> int:
        with self._lock:
            return sum(entry.is_ready for entry in self._entries.values())

    @property
    def num_waiting(self) -> int:
        """Adapters that wait for room."""
        with self._lock:
            return sum(not entry.is_ordered for entry in self._entries.values())

    def admit(self, request: GenerateRequest) -> None:
        """Put a request into the inbox, where it arrives once its adapter is ready everywhere. Raises what the entrance
        and the inbox raise."""
        adapter = request.adapter
        assert adapter is not None
        with self._lock:
            entry = self._entry(adapter)
            is_ready = entry.is_ready
            if not is_ready:
                try:
                    self._inbox.put(request, (entry.hold,))
                except BaseException:
                    self._drop_if_unwanted(entry)
                    raise
            entry.users.add(request.request_id)
            self._begin_waiting()
        if is_ready:
            try:
                self._entrance.enter(request, self._inbox.put)
            except BaseException:
                self.let_go(request.request_id, adapter.digest)
                raise

    def load(self, adapter: Adapter) -> None:
        """Return once every rank has it in memory. Raises TensorweaveError if one cannot load it, or not in time."""
        with self._lock:
            entry = self._entry(adapter)
            self._begin_waiting()
        if not entry.is_over.wait(self._timeout_s):
            raise NotReady(f"adapter {adapter.name!r} waits for room: all that are loaded are in use")
        if entry.error is not None:
            raise entry.error.with_traceback(None)

    def let_go(self, request_id: str, digest: bytes) -> None:
        """A request has ended."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                entry.users.discard(request_id)
                self._begin_waiting()

    def take_report(self, report: OrderReport) -> None:
        """A rank has loaded an adapter, or could not."""
        with self._lock:
            entry = self._entries.get(report.digest)
            if entry is None or entry.is_over.is_set() or entry.number != report.number:
                return
            if report.problem:
                self._fail(entry, _refusal(entry.adapter, report.problem))
                return
            entry.missing.discard(report.rank)
            if entry.missing:
                return
            entry.is_ready = True
            self.num_loads += 1
            self._finish(entry)
            self._begin_waiting()  # it makes room itself where all who asked for it have been cancelled
        self._release(entry)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for entry in list(self._entries.values()):
                if not entry.is_ready:
                    self._fail(entry, NotReady("the executor has been shut down"))

    def _entry(self, adapter: Adapter) -> _Entry:
        entry = self._entries.get(adapter.digest)
        if entry is None:
            entry = self._entries[adapter.digest] = _Entry(adapter, next(self._numbers), set(range(self._size)))
        self._entries.move_to_end(adapter.digest)
        return entry

    def _begin_waiting(self) -> None:
        """Load those that wait, the first that came first, while there is room."""
        waiting = [entry for entry in self._entries.values() if not entry.is_ordered]
        for entry in sorted(waiting, key=lambda entry: entry.number):
            if not self._make_room():
                return
            entry.is_ordered = True
            entry.timer = threading.Timer(self._timeout_s, self._end_late, [entry])
            entry.timer.daemon = True
            entry.timer.start()
            self._inbox.put_adapter_order(AdapterOrder("load", entry.adapter, number=entry.number))

    def _make_room(self) -> bool:
        held = [entry for entry in self._entries.values() if entry.is_ordered]
        if len(held) < self._capacity:
            return True
        idle = next((entry for entry in held if entry.is_ready and not entry.users), None)
        if idle is not None:
            self._forget(idle)
        return idle is not None

    def _release(self, entry: _Entry) -> None:
        """Without the lock, which nobody may hold who waits for the locks of others. The adapter stays: these requests
        are its users."""
        for request in self._inbox.held_for(entry.hold):
            try:
                self._entrance.enter(request, self._inbox.hold)
            except TensorweaveError as error:
                self._entrance.refuse_one(request, error)
        self._inbox.release(entry.hold)

    def _end_late(self, entry: _Entry) -> None:
        with self._lock:
            if not entry.is_over.is_set():
                ranks = ", ".join(map(str, sorted(entry.missing)))
                problem = f"ranks {ranks} have not loaded it within {self._timeout_s:g} s"
                self._fail(
                    entry, NotReady(f"adapter {entry.adapter.name!r} is not ready: {problem}", retry_after_s=5.0)
                )

    def _fail(self, entry: _Entry, error: TensorweaveError) -> None:
        entry.error = error
        self.num_failed += 1
        self._finish(entry)
        self._forget(entry)
        self._entrance.refuse(entry.hold, error)
        self._begin_waiting()

    def _finish(self, entry: _Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
        entry.is_over.set()

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.adapter.digest]
        if not self._is_closed and entry.is_ordered:
            self._inbox.put_adapter_order(AdapterOrder("forget", digest=entry.adapter.digest))

    def _drop_if_unwanted(self, entry: _Entry) -> None:
        if not entry.is_ordered and not entry.users:
            del self._entries[entry.adapter.digest]


def _refusal(adapter: Adapter, problem: str) -> RequestRejected:
    return RequestRejected(f"adapter {adapter.name!r} was refused: {problem}", param=ADAPTER_PARAM)
