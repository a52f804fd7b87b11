"""The giving side that carriers share: `TicketTable` finds offers by ticket, `Serving` says what a claim gets next."""

from __future__ import annotations

import collections
import threading
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import Tensor

from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.carrier import Claim, FailureKind
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks, Row
from tensorweave.workers.transfer.transports.loader import Loader
from tensorweave.workers.transfer.window import PoolWindow

_REMEMBERED_TICKETS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Blocks:
    rows: tuple[Row, ...]
    digests: bytes
    payload: Tensor


@dataclass(frozen=True, slots=True)
class End:
    first_token: int | None
    extras: TokenExtras | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    kind: FailureKind
    reason: str


Message: TypeAlias = Blocks | End | Refusal


class TicketTable:
    """Tickets on offer at this rank. `version` counts whatever may give a serving something new to send."""

    def __init__(self, window: PoolWindow, fingerprint: dict[str, str]) -> None:
        self.window = window
        self.fingerprint = fingerprint
        self.version = 0
        self._changed = threading.Condition()
        self._offers: dict[str, OfferedBlocks] = {}
        self._closed: collections.OrderedDict[str, None] = collections.OrderedDict()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        with self._changed:
            if ticket_id not in self._closed:
                self._offers[ticket_id] = offered
        self.poke()

    def close(self, ticket_id: str) -> None:
        """The ticket is remembered: a claim that comes later is refused at once, and does not wait for an offer."""
        with self._changed:
            self._offers.pop(ticket_id, None)
            self._closed[ticket_id] = None
            if len(self._closed) > _REMEMBERED_TICKETS:
                self._closed.popitem(last=False)
        self.poke()

    def poke(self) -> None:
        """Servings look again."""
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def wait(self, seen_version: int, timeout_s: float) -> None:
        """Until something has changed since `seen_version` was read, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != seen_version, timeout_s)

    def find(self, ticket_id: str) -> OfferedBlocks | Refusal | None:
        """None: not on offer yet."""
        if ticket_id in self._closed:
            return Refusal("gone", "the ticket has been closed")
        return self._offers.get(ticket_id)


class Serving:
    """One claim being served."""

    def __init__(self, table: TicketTable, claim: Claim, loader: Loader) -> None:
        self.claim = claim
        self.is_over = False
        self._table = table
        self._loader = loader
        self._num_sent = 0
        first = claim.first_head - table.window.heads.start
        self._heads = range(first, first + claim.num_heads) if claim.num_heads else range(0)
        self._limit = loader.message_blocks(claim.num_heads)

    @property
    def message_bytes(self) -> int:
        """Staging that `next` needs."""
        return self._limit * self._loader.block_bytes(self.claim.num_heads)

    def next(self, staging: Tensor) -> Message | None:
        """What to send now, its payload in `staging`; None where the next blocks are not computed yet."""
        message = self._next(staging)
        self.is_over = isinstance(message, End | Refusal)
        return message

    def _next(self, staging: Tensor) -> Message | None:
        offered = self._misfit() or self._table.find(self.claim.ticket_id)
        if not isinstance(offered, OfferedBlocks):
            return offered
        if offered.prompt != self.claim.prompt:
            return Refusal("refused", "prompt: the ticket is for other tokens")
        is_complete, end = offered.is_complete, End(offered.first_token, offered.extras)
        rows = offered.rows(self._upcoming(len(offered))) if self._heads else []
        if not rows:
            return end if is_complete else None
        payload = staging[: len(rows) * self._loader.block_bytes(len(self._heads))]
        digests = offered.read(rows, self._heads, payload, self._loader)
        if digests is None:
            return None
        self._num_sent += len(rows)
        return Blocks(tuple(rows), digests, payload)

    def _upcoming(self, num_blocks: int) -> list[int]:
        if self.claim.only:
            return list(self.claim.only[self._num_sent : self._num_sent + self._limit])
        start = self.claim.first_block + self._num_sent
        return list(range(start, min(num_blocks, start + self._limit)))

    def _misfit(self) -> Refusal | None:
        difference = fingerprint_difference(self._table.fingerprint, self.claim.fingerprint)
        if difference is not None:
            return Refusal("refused", difference)
        held = self._table.window.heads
        if self._heads and not (held.start <= self.claim.first_head and self._heads.stop <= len(held)):
            return Refusal("refused", f"heads: this rank holds {held.start} to {held.stop - 1}")
        return None


def fingerprint_difference(giver: dict[str, str], taker: dict[str, str]) -> str | None:
    """The first thing that differs, in words; None where blocks of one fit the other."""
    for name in [*giver, *(name for name in taker if name not in giver)]:
        if giver.get(name) != taker.get(name):
            return f"{name}: {giver.get(name)!r} where the KV is given, {taker.get(name)!r} where it is taken"
    return None
