"""The transfer seam: `Carrier`, four verbs that move KV blocks between ranks of two gangs, whatever transport is used.

A carrier moves bytes and checks none: received blocks are announced and handed to a `BlockSink`, which verifies them.
The sender's blocks are an `OfferedBlocks`. Tickets, leases, deadlines and the handling of failures belong to the
caller, `workers.transfer.transfers`.

    receiving rank                                           sending rank
      fetch(request) ── ticket, heads, first block ─────────▶  waits until the ticket is on offer
         sink.announce ◀── headers: index, generation, … ─────┐  offer(blocks), again when there are more
         sink.put      ◀── blocks: packed bytes ──────────────┤  … each block once, as soon as it is computed
      poll → ReadDone  ◀── end: first token ──────────────────┘
      close(ticket)  ── close ──────────────────────────────▶  poll → TicketReleased (if the read ends the lease)
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.block_sink import BlockSink
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks

FailureKind = Literal[
    "digest",
    "stale",
    "missing",
    "truncated",
    "duplicate",
    "late",
    "timeout",
    "peer_lost",
    "no_transport",
    "refused",
    "gone",
]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True, slots=True)
class ReadDone:
    """All blocks of a read request were sent. `first_token` follows the prompt; `extras` are its log-probabilities and
    the like."""

    read_id: str
    first_token: int | None
    extras: TokenExtras | None = None


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """No more blocks of this read request will arrive."""

    read_id: str
    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class TicketReleased:
    """On the sending side: the holder of the ticket has finished, or was lost."""

    ticket_id: str


Event: TypeAlias = ReadDone | ReadFailed | TicketReleased


class EventQueue:
    """Events from a carrier's threads to `poll`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._queue.put(event)

    def take(self, timeout_s: float) -> list[Event]:
        """Return all queued events; wait for the first, at most `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        events: list[Event] = []
        while not events or not self._queue.empty():
            try:
                events.append(self._queue.get(timeout=max(0.0, deadline_s - time.monotonic())))
            except queue.Empty:
                break
        return events


class Carrier(Protocol):
    """Moves blocks between ranks. The four verbs may be called on any thread; all but `poll` return at once. `probe`
    measures the link.

    `address` is the host and port at which other ranks' carriers reach this one.
    """

    address: tuple[str, int]

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        """Serve read requests under the ticket, earlier and later ones, from these blocks. Call it again when blocks
        were added."""

    def fetch(self, endpoint: KvEndpoint, secret: str, request: ReadRequest, sink: BlockSink) -> None:
        """Begin to fill the sink. `poll` returns `ReadDone` or `ReadFailed`, unless the ticket is closed before."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the events since the last call; wait for the first, at most `timeout_s`. One thread polls."""

    def close(self, ticket_id: str) -> None:
        """End this rank's reads under the ticket, or withdraw its offer: open and later reads of it fail."""

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        """Request `num_bytes` from the endpoint and return the seconds until all have arrived. Raises
        TransferFailed."""

    def transport_to(self, endpoint: KvEndpoint, secret: str) -> str:
        """What carries bytes from this endpoint, which has been probed."""

    def shutdown(self) -> None:
        """Close all connections and end all threads."""
