"""`FaultyCarrier`: any carrier, with faults put in between it and the sinks, for tests and chaos runs.

Faults are drawn from a seeded generator, one at most for each put, and counted by what was done:

    flip       one bit of the payload is other         stale    the bytes and tag of an earlier generation
    truncate   the payload's end is missing            late     the put comes after the ticket was closed
    duplicate  the put comes twice                     delay    it and all that follows come after the deadline
    drop       the put does not come                   die      half of it comes, then the peer is lost
"""

from __future__ import annotations

import collections
import random
import threading
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.carrier import Carrier, Claim, Event, EventQueue, Failed, Sink, TicketOver
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks, Row

Fault = Literal["flip", "stale", "late", "truncate", "duplicate", "drop", "delay", "die"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

_HeldPut: TypeAlias = tuple[Sink, list[tuple[int, int]], Tensor]


class FaultyCarrier:
    """Satisfies `Carrier`. `rate` is the odds of a fault for each put; `most` bounds their number."""

    def __init__(
        self, inner: Carrier, seed: int, rate: float, faults: Sequence[Fault] = FAULTS, most: int | None = None
    ) -> None:
        self.address = inner.address
        self.injected: collections.Counter[Fault] = collections.Counter()
        self._inner = inner
        self._random = random.Random(seed)
        self._rate = rate
        self._faults = tuple(faults)
        self._most = most
        self._lock = threading.Lock()
        self._events = EventQueue()
        self._muted: set[str] = set()
        self._held: dict[str, list[_HeldPut]] = {}
        self._closed: set[str] = set()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self._inner.offer(ticket_id, offered)

    def fetch(self, endpoint: KvEndpoint, secret: str, claim: Claim, sink: Sink) -> None:
        self._inner.fetch(endpoint, secret, claim, _FaultySink(self, claim, sink))

    def poll(self, timeout_s: float) -> list[Event]:
        mine = self._events.take(0.0)
        events = [*mine, *self._inner.poll(0.0 if mine else timeout_s)]
        return [
            event for event in events if isinstance(event, TicketOver | Failed) or not self.is_muted(event.claim_id)
        ]

    def close(self, ticket_id: str) -> None:
        self._inner.close(ticket_id)
        with self._lock:
            self._closed.add(ticket_id)
            held = self._held.pop(ticket_id, [])
        for sink, blocks, payload in held:
            sink.put(blocks, payload)

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        return self._inner.probe(endpoint, secret, num_bytes, timeout_s)

    def shutdown(self) -> None:
        self._inner.shutdown()

    # ---- asked by its sinks

    def draw(self) -> Fault | None:
        with self._lock:
            if self._random.random() >= self._rate or (self._most is not None and self.injected.total() >= self._most):
                return None
            fault = self._random.choice(self._faults)
            self.injected[fault] += 1
            return fault

    def below(self, limit: int) -> int:
        with self._lock:
            return self._random.randrange(limit)

    def is_muted(self, claim_id: str) -> bool:
        return claim_id in self._muted

    def mute(self, claim_id: str) -> None:
        """Nothing of this claim gets through any more."""
        self._muted.add(claim_id)

    def hold(self, claim: Claim, put: _HeldPut) -> None:
        """Until the ticket has been closed: then it comes, late."""
        with self._lock:
            if claim.ticket_id not in self._closed:
                self._held.setdefault(claim.ticket_id, []).append(put)
                return
        sink, blocks, payload = put
        sink.put(blocks, payload)

    def kill(self, claim: Claim) -> None:
        self.mute(claim.claim_id)
        self._events.put(Failed(claim.claim_id, "peer_lost", "the peer died, by order"))


class _FaultySink:
    """Stands before a real sink."""

    def __init__(self, carrier: FaultyCarrier, claim: Claim, sink: Sink) -> None:
        self._carrier = carrier
        self._claim = claim
        self._sink = sink

    def announce(self, rows: Sequence[Row], digests: bytes) -> None:
        if not self._carrier.is_muted(self._claim.claim_id):
            self._sink.announce(rows, digests)

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        if self._carrier.is_muted(self._claim.claim_id):
            self._carrier.hold(self._claim, (self._sink, list(blocks), payload.clone()))
            return
        fault = self._carrier.draw()
        match fault:
            case None:
                self._sink.put(blocks, payload)
            case "flip":
                flipped = payload.clone()
                flipped[self._carrier.below(len(flipped))] ^= 1 << self._carrier.below(8)
                self._sink.put(blocks, flipped)
            case "stale":
                old = payload.roll(self._carrier.below(len(payload)))
                self._sink.put([(index, tag - 1) for index, tag in blocks], old)
            case "truncate":
                self._sink.put(blocks, payload[: self._carrier.below(len(payload))])
            case "duplicate":
                self._sink.put(blocks, payload)
                self._sink.put(blocks, payload)
            case "drop":
                pass
            case "late" | "delay":
                self._carrier.hold(self._claim, (self._sink, list(blocks), payload.clone()))
                if fault == "delay":
                    self._carrier.mute(self._claim.claim_id)
            case "die":
                self._sink.put(blocks[:1], payload[: len(payload) // len(blocks) // 2])
                self._carrier.kill(self._claim)
