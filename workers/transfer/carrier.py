"""The transfer seam: `Carrier`, four verbs that move KV blocks between ranks of two gangs, whatever carries the bytes.

A carrier moves and never judges: what arrives is announced and put into a `Sink`, which checks it. What a prompt
offers is an `OfferedBlocks`. The rest (tickets, leases, deadlines, digests, what to do when something fails) is the
caller's, `workers.transfer.transfers`.

    taking rank                                              giving rank
      fetch(claim) ── claim: ticket, heads, first block ────▶  waits for the ticket's offered
         sink.announce ◀── rows: index, tag, tokens, digests ─┐  offer(offered), again when it has grown
         sink.put      ◀── blocks: packed bytes ──────────────┤  … each block once, as soon as it is computed
      poll → Ended     ◀── end: first token ──────────────────┘
      close(ticket)  ── close ──────────────────────────────▶  poll → TicketOver (for a claim that ends the lease)
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

from torch import Tensor

from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks, Row

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
class Claim:
    """What a rank wants of another under a ticket: KV heads [first_head, first_head + num_heads) of all layers, of the
    blocks from `first_block` on, or of the blocks `only`.

    `prompt` is a digest of the tokens that the blocks are for. A claim on no head asks for the end alone. One that
    `ends_lease` tells the giving rank, when it is closed or its connection breaks, that nobody will read any more.
    """

    claim_id: str
    ticket_id: str
    fingerprint: dict[str, str]
    prompt: str
    first_head: int
    num_heads: int
    first_block: int
    only: tuple[int, ...] = ()
    ends_lease: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """All of a claim's blocks have been sent; `first_token` follows the prompt, and `extras` is told with it."""

    claim_id: str
    first_token: int | None
    extras: TokenExtras | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing more comes of this claim."""

    claim_id: str
    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class TicketOver:
    """Giving side: whoever held the ticket is done with it, or gone."""

    ticket_id: str


Event: TypeAlias = Ended | Failed | TicketOver


class EventQueue:
    """What carriers' threads leave for `poll`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._queue.put(event)

    def take(self, timeout_s: float) -> list[Event]:
        """All there is; waits for one, at most `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        events: list[Event] = []
        while not events or not self._queue.empty():
            try:
                events.append(self._queue.get(timeout=max(0.0, deadline_s - time.monotonic())))
            except queue.Empty:
                break
        return events


class Sink(Protocol):
    """Where a claim's blocks go. Called on a carrier's threads, one call at a time."""

    def announce(self, rows: Sequence[Row], digests: bytes) -> None:
        """These blocks come next; `digests` are theirs, [rows, layers, heads of the claim] int64 little-endian."""

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        """Bytes of the blocks with these (index, tag), packed (see `PoolWindow`); `payload` is used again after."""


class Carrier(Protocol):
    """Moves blocks between ranks. The four verbs, from any thread, return at once, but
    `poll`; `probe` measures.

    `address` is where other ranks' carriers reach this one: host and port.
    """

    address: tuple[str, int]

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        """Give these blocks to claims under the ticket, earlier and later ones; again when there are more."""

    def fetch(self, endpoint: KvEndpoint, secret: str, claim: Claim, sink: Sink) -> None:
        """Begin to fill the sink; ends with `Ended` or `Failed` from `poll`, unless the ticket is closed before."""

    def poll(self, timeout_s: float) -> list[Event]:
        """What has happened since the last call; waits for something, at most `timeout_s`. One thread polls."""

    def close(self, ticket_id: str) -> None:
        """End this rank's claims under the ticket, or take its offer back: open and later claims on it fail."""

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        """Seconds until `num_bytes` asked of the endpoint have all come; it waits for them. Raises TransferFailed."""

    def shutdown(self) -> None:
        """Close all connections and end all threads."""
