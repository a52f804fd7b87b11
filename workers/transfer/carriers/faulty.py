"""`FaultyCarrier`: wraps any carrier and injects faults between it and the sinks, for tests and chaos runs.

Faults are drawn from a seeded generator, at most one per put, and counted:

    flip       one bit of the payload is inverted      stale    the bytes and generation of earlier content
    truncate   the payload's end is missing            late     the put comes after the ticket was closed
    duplicate  the put comes twice                     delay    it and all that follow come after the deadline
    drop       the put does not come                   die      half of it comes, then the peer is lost
"""

from __future__ import annotations

import collections
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.carrier import Carrier, Event, EventQueue, ReadFailed, TicketReleased
from tensorweave.workers.transfer.read_request import BlockHeader, ReadRequest
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks

Fault = Literal["flip", "stale", "late", "truncate", "duplicate", "drop", "delay", "die"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

_Put: TypeAlias = Callable[[], None]


class FaultyCarrier:
    """Satisfies `Carrier`. `rate` is the probability of a fault per put."""

    def __init__(self, inner: Carrier, seed: int, rate: float, faults: Sequence[Fault] = FAULTS) -> None:
        self.address = inner.address
        self.injected: collections.Counter[Fault] = collections.Counter()
        self._inner = inner
        self._random = random.Random(seed)
        self._rate = rate
        self._faults = tuple(faults)
        self._lock = threading.Lock()
        self._events = EventQueue()
        self._muted: set[str] = set()
        self._delayed: dict[str, list[_Put]] = {}
        self._closed: set[str] = set()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self._inner.offer(ticket_id, offered)

    def fetch(self, endpoint: KvEndpoint, secret: str, request: ReadRequest, sink: BlockSink) -> None:
        self._inner.fetch(endpoint, secret, request, _FaultySink(self, request, sink))

    def poll(self, timeout_s: float) -> list[Event]:
        own = self._events.take(0.0)
        events = [*own, *self._inner.poll(0.0 if own else timeout_s)]
        return [e for e in events if isinstance(e, TicketReleased | ReadFailed) or not self.is_muted(e.read_id)]

    def close(self, ticket_id: str) -> None:
        self._inner.close(ticket_id)
        with self._lock:
            self._closed.add(ticket_id)
            delayed = self._delayed.pop(ticket_id, [])
        for put in delayed:
            put()

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        return self._inner.probe(endpoint, secret, num_bytes, timeout_s)

    def transport_to(self, endpoint: KvEndpoint, secret: str) -> str:
        return self._inner.transport_to(endpoint, secret)

    def shutdown(self) -> None:
        self._inner.shutdown()

    # ---- called by its sinks

    def draw_fault(self) -> Fault | None:
        with self._lock:
            if self._random.random() >= self._rate:
                return None
            fault = self._random.choice(self._faults)
            self.injected[fault] += 1
            return fault

    def draw_below(self, limit: int) -> int:
        with self._lock:
            return self._random.randrange(limit)

    def is_muted(self, read_id: str) -> bool:
        return read_id in self._muted

    def mute(self, read_id: str) -> None:
        """Let nothing of this read through any more."""
        self._muted.add(read_id)

    def delay(self, request: ReadRequest, put: _Put) -> None:
        """Hold the put back until the ticket is closed: it is late then."""
        with self._lock:
            if request.ticket_id not in self._closed:
                self._delayed.setdefault(request.ticket_id, []).append(put)
                return
        put()

    def kill(self, request: ReadRequest) -> None:
        self.mute(request.read_id)
        self._events.put(ReadFailed(request.read_id, "peer_lost", "injected fault: the peer died"))


class _FaultySink:
    """Injects faults before the real sink."""

    def __init__(self, carrier: FaultyCarrier, request: ReadRequest, sink: BlockSink) -> None:
        self._carrier = carrier
        self._request = request
        self._sink = sink

    def announce(self, headers: Sequence[BlockHeader], digests: bytes) -> None:
        if not self._carrier.is_muted(self._request.read_id):
            self._sink.announce(headers, digests)

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        if self._carrier.is_muted(self._request.read_id):
            self._carrier.delay(self._request, partial(self._sink.put, list(blocks), payload.clone()))
            return
        fault = self._carrier.draw_fault()
        match fault:
            case None:
                self._sink.put(blocks, payload)
            case "flip":
                flipped = payload.clone()
                flipped[self._carrier.draw_below(len(flipped))] ^= 1 << self._carrier.draw_below(8)
                self._sink.put(blocks, flipped)
            case "stale":
                old = payload.roll(self._carrier.draw_below(len(payload)))
                self._sink.put([(index, generation - 1) for index, generation in blocks], old)
            case "truncate":
                self._sink.put(blocks, payload[: self._carrier.draw_below(len(payload))])
            case "duplicate":
                self._sink.put(blocks, payload)
                self._sink.put(blocks, payload)
            case "drop":
                pass
            case "late" | "delay":
                self._carrier.delay(self._request, partial(self._sink.put, list(blocks), payload.clone()))
                if fault == "delay":
                    self._carrier.mute(self._request.read_id)
            case "die":
                self._sink.put(blocks[:1], payload[: len(payload) // len(blocks) // 2])
                self._carrier.kill(self._request)

    def pull(self, part: BlockPart, pool_LB2KPH: Tensor, heads: range) -> FinishCopy:
        def pull_late() -> None:
            self._sink.pull(part, pool_LB2KPH, heads)()

        if self._carrier.is_muted(self._request.read_id):
            self._carrier.delay(self._request, pull_late)
            return _nothing
        fault = self._carrier.draw_fault()
        match fault:
            case None:
                return self._sink.pull(part, pool_LB2KPH, heads)
            case "flip" | "stale":
                return self._sink.pull(part, self._damaged(part, pool_LB2KPH, heads, fault), heads)
            case "truncate":
                return self._sink.pull(part.chosen(np.arange(len(part.rows_N5) // 2)), pool_LB2KPH, heads)
            case "duplicate":
                first = self._sink.pull(part, pool_LB2KPH, heads)
                return partial(_both, first, self._sink.pull(part, pool_LB2KPH, heads))
            case "drop":
                return _nothing
            case "late" | "delay":
                self._carrier.delay(self._request, pull_late)
                if fault == "delay":
                    self._carrier.mute(self._request.read_id)
                return _nothing
            case "die":
                half = self._sink.pull(part.chosen(np.arange(1)), pool_LB2KPH, heads)
                return partial(_both, half, partial(self._carrier.kill, self._request))

    def _damaged(self, part: BlockPart, pool_LB2KPH: Tensor, heads: range, fault: Fault) -> Tensor:
        """The pool with one bit of a block inverted, or with other content in that block."""
        damaged, draw = pool_LB2KPH.clone(), self._carrier.draw_below
        block_id = int(part.rows_N5[draw(len(part.rows_N5)), 3])
        layer, head = part.layers[draw(len(part.layers))], heads[draw(len(heads))]
        plane = damaged[layer, block_id, draw(2), head].view(torch.uint8).view(-1)
        if fault == "flip":
            plane[draw(len(plane))] ^= 1 << draw(8)
        else:
            plane.copy_(plane.roll(1 + draw(len(plane) - 1)) ^ 1)
        return damaged


def _nothing() -> None:
    """The end of a copy that was not begun."""


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()
