"""What reaches the step loop from outside: arrivals, cancels, deadlines, transfers, handed over once a step.

`Inbox` belongs to rank 0: any thread may put, only the step loop gathers. `FollowerInbox` is the Null object of the
other ranks, whose input comes through the agreement. `StepInput` is what all ranks agree on, packed with msgpack.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple

import msgpack

from tensorweave.cluster.errors import NotReady, Overloaded
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.lora.orders import AdapterOrder
from tensorweave.workers.step.kv_exchange import KvArrived

EXPECT_WAIT_S: Final = 0.01
"""Putting a request takes 0.15 to 0.25 ms of the thread that puts it."""
EXPECTED_TOKENS: Final = 4096
"""Prompt tokens enough for a step: while a device computes them, the others come."""


class StepInput(NamedTuple):
    """What all ranks agree on at the beginning of a step. `token_check` is rank 0's checksum of all tokens that have
    settled: a rank that differs has diverged."""

    now_s: float
    token_check: int
    arrivals: Sequence[GenerateRequest] = ()
    cancelled: Sequence[str] = ()
    expired: Sequence[str] = ()
    arrived: Sequence[KvArrived] = ()
    released: Sequence[str] = ()
    is_shutdown: bool = False
    guide_orders: Sequence[GuideOrder] = ()
    adapter_orders: Sequence[AdapterOrder] = ()

    def pack(self) -> bytes:
        arrivals = [request.to_wire() for request in self.arrivals]
        arrived = [item.to_wire() for item in self.arrived]
        ends = [self.cancelled, self.expired, arrived, self.released, self.is_shutdown]
        orders = [[order.to_wire() for order in each] for each in (self.guide_orders, self.adapter_orders)]
        fields = [self.now_s, self.token_check, arrivals, *ends, *orders]
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> StepInput:
        now_s, token_check, arrivals, cancelled, expired, arrived, *rest = msgpack.unpackb(data)
        released, is_shutdown, guide_orders, adapter_orders = rest
        requests = [GenerateRequest.from_wire(fields) for fields in arrivals]
        arrivals = [KvArrived.from_wire(fields) for fields in arrived]
        guides = [GuideOrder.from_wire(fields) for fields in guide_orders]
        adapters = [AdapterOrder.from_wire(fields) for fields in adapter_orders]
        return cls(now_s, token_check, requests, cancelled, expired, arrivals, released, is_shutdown, guides, adapters)


class Inbox:
    """Rank 0's inbox. At most `max_requests` are in the executor at once, waiting or running; one more is refused with
    `Overloaded`."""

    def __init__(self, max_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._changed = threading.Condition()
        self._clock = clock
        self._max_requests = max_requests
        self._inside: set[str] = set()
        self._arrivals: list[GenerateRequest] = []
        self._held: dict[str, tuple[GenerateRequest, set[bytes]]] = {}
        """With what each waits for."""
        self._guide_orders: list[GuideOrder] = []
        self._adapter_orders: list[AdapterOrder] = []
        self._cancelled: list[str] = []
        self._arrived: list[KvArrived] = []
        self._released: list[str] = []
        self._deadlines: list[tuple[float, str]] = []
        self._deadline_of: dict[str, float] = {}
        """Of those inside: an id may come again before the deadline of the request that had it first."""
        self._num_expected = self._num_expected_tokens = 0
        self._is_shutdown = False
        self._closed_by: Exception | None = None

    @property
    def num_inside(self) -> int:
        return len(self._inside)

    @property
    def has_room(self) -> bool:
        return len(self._inside) < self._max_requests and not self._is_shutdown and self._closed_by is None

    def put(self, request: GenerateRequest, holds: Collection[bytes] = ()) -> None:
        """A request with `holds` arrives when all of these are released, or with its cancel or the end of its deadline.
        Raises Overloaded when full, NotReady when shutting down, ValueError for an id that is inside already."""
        with self._changed:
            if self._closed_by is not None:
                raise self._closed_by.with_traceback(None)  # else each raise adds to it
            if self._is_shutdown:
                raise NotReady("the executor is shutting down")
            if request.request_id in self._inside:
                raise ValueError(f"request id {request.request_id!r} is in use")
            if len(self._inside) >= self._max_requests:
                raise Overloaded(f"{self._max_requests} requests are waiting or running", retry_after_s=1.0)
            self._inside.add(request.request_id)
            if holds:
                self._held[request.request_id] = request, set(holds)
            else:
                self._arrivals.append(request)
            if request.deadline_s is not None:
                deadline_s = self._deadline_of[request.request_id] = self._clock() + request.deadline_s
                heapq.heappush(self._deadlines, (deadline_s, request.request_id))
            if self._num_expected:
                self._num_expected -= 1
                self._num_expected_tokens += len(request.prompt_token_ids)
                if self._num_expected_tokens >= EXPECTED_TOKENS:
                    self._num_expected = 0
            if not self._num_expected or len(self._arrivals) == 1:
                self._changed.notify()

    def expect(self, num_requests: int) -> None:
        """So many requests are about to be put. An idle loop waits for them, so that they begin in the same step: for
        all of them or `EXPECTED_TOKENS`, and at most `EXPECT_WAIT_S` after the first."""
        with self._changed:
            self._num_expected, self._num_expected_tokens = num_requests, 0

    def held_for(self, hold: bytes) -> list[GenerateRequest]:
        with self._changed:
            return [request for request, holds in self._held.values() if hold in holds]

    def hold(self, request: GenerateRequest, holds: Collection[bytes]) -> None:
        """Let a held request wait for these too. It may have ended."""
        with self._changed:
            if request.request_id in self._held:
                self._held[request.request_id][1].update(holds)

    def release(self, hold: bytes) -> None:
        """Let the requests arrive that wait for nothing else."""
        with self._changed:
            for request, holds in list(self._held.values()):
                holds.discard(hold)
                if not holds:
                    del self._held[request.request_id]
                    self._arrivals.append(request)
            self._changed.notify()

    def drop(self, hold: bytes) -> list[GenerateRequest]:
        """End the requests that wait for this, which then never arrive. Return them."""
        with self._changed:
            return [request for request in self.held_for(hold) if self.drop_one(request)]

    def drop_one(self, request: GenerateRequest) -> bool:
        """The same of one request. False if it waits for nothing."""
        with self._changed:
            is_held = self._held.pop(request.request_id, None) is not None
            if is_held:
                self._inside.discard(request.request_id)
                self._deadline_of.pop(request.request_id, None)
            return is_held

    def put_adapter_order(self, order: AdapterOrder) -> None:
        with self._changed:
            self._adapter_orders.append(order)
            self._changed.notify()

    def put_guide_order(self, order: GuideOrder) -> None:
        with self._changed:
            self._guide_orders.append(order)
            self._changed.notify()

    def cancel(self, request_id: str) -> bool:
        """Return False if there is no such request: it has ended, or never came."""
        with self._changed:
            if request_id not in self._inside:
                return False
            self._cancelled.append(request_id)
            self._changed.notify()
            return True

    def put_arrived(self, arrived: KvArrived) -> None:
        with self._changed:
            self._arrived.append(arrived)
            self._changed.notify()

    def put_released(self, request_id: str) -> None:
        with self._changed:
            self._released.append(request_id)
            self._changed.notify()

    def forget(self, request_id: str) -> None:
        """The step loop has ended this request."""
        with self._changed:
            self._inside.discard(request_id)
            self._deadline_of.pop(request_id, None)

    def shut_down(self) -> None:
        with self._changed:
            self._is_shutdown = True
            self._changed.notify()

    def close(self, error: Exception) -> list[str]:
        """The step loop failed: refuse all that comes. Returns the ids of the requests inside."""
        with self._changed:
            self._closed_by = error
            orphans = sorted(self._inside)
            self._inside.clear()
            self._held.clear()
            self._deadline_of.clear()
            return orphans

    def gather(self, token_check: int, idle_wait_s: float) -> StepInput:
        """Take everything new. If there is nothing, wait up to `idle_wait_s` for it."""
        with self._changed:
            if idle_wait_s > 0 and not self._has_input():
                self._changed.wait(self._until_deadline(idle_wait_s))
            if idle_wait_s > 0 and self._arrivals and self._num_expected:
                self._changed.wait_for(lambda: not self._num_expected or self._is_shutdown, EXPECT_WAIT_S)
                self._num_expected = 0
            now_s = self._clock()
            arrivals, self._arrivals = self._arrivals, []
            cancelled, self._cancelled = self._cancelled, []
            arrived, self._arrived = self._arrived, []
            released, self._released = self._released, []
            guides, self._guide_orders = self._guide_orders, []
            adapters, self._adapter_orders = self._adapter_orders, []
            expired = list(self._pop_expired(now_s))
            if self._held:
                ends = [self._held.pop(request_id, None) for request_id in (*cancelled, *expired)]
                arrivals += [end[0] for end in ends if end is not None]
            is_shutdown = self._is_shutdown
        ends_of = cancelled, expired, arrived, released, is_shutdown
        return StepInput(now_s, token_check, arrivals, *ends_of, guides, adapters)

    def _has_input(self) -> bool:
        has_new = self._arrivals or self._cancelled or self._arrived or self._released
        return bool(has_new or self._guide_orders or self._adapter_orders or self._is_shutdown)

    def _until_deadline(self, limit_s: float) -> float:
        if not self._deadlines:
            return limit_s
        return min(limit_s, max(0.0, self._deadlines[0][0] - self._clock()))

    def _pop_expired(self, now_s: float) -> Iterator[str]:
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            if self._deadline_of.get(request_id) == deadline_s:
                yield request_id


class FollowerInbox:
    """The inbox of other ranks than 0, which gather nothing."""

    num_inside = 0
    has_room = False

    def put(self, request: GenerateRequest, holds: Collection[bytes] = ()) -> None:
        raise AssertionError("only rank 0 takes requests")

    def held_for(self, hold: bytes) -> list[GenerateRequest]:
        raise AssertionError("only rank 0 takes requests")

    def hold(self, request: GenerateRequest, holds: Collection[bytes]) -> None:
        raise AssertionError("only rank 0 takes requests")

    def release(self, hold: bytes) -> None:
        raise AssertionError("only rank 0 takes requests")

    def drop_one(self, request: GenerateRequest) -> bool:
        raise AssertionError("only rank 0 takes requests")

    def drop(self, hold: bytes) -> list[GenerateRequest]:
        raise AssertionError("only rank 0 takes requests")

    def put_guide_order(self, order: GuideOrder) -> None:
        raise AssertionError("only rank 0 gives orders")

    def put_adapter_order(self, order: AdapterOrder) -> None:
        raise AssertionError("only rank 0 gives orders")

    def expect(self, num_requests: int) -> None:
        raise AssertionError("only rank 0 takes requests")

    def cancel(self, request_id: str) -> bool:
        raise AssertionError("only rank 0 cancels requests")

    def gather(self, token_check: int, idle_wait_s: float) -> None:
        return None

    def put_arrived(self, arrived: KvArrived) -> None:
        return None

    def put_released(self, request_id: str) -> None:
        return None

    def forget(self, request_id: str) -> None:
        return None

    def close(self, error: Exception) -> list[str]:
        return []

    def shut_down(self) -> None:
        return None
