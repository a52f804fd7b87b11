"""`ReadSession`: one read request while a carrier serves it, and the replies that it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.carrier import FailureKind
from tensorweave.workers.transfer.fingerprint import fingerprint_difference
from tensorweave.workers.transfer.read_request import BlockHeader, ReadRequest
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.sending.ticket_table import TicketTable
from tensorweave.workers.transfer.transports.loader import Loader


@dataclass(frozen=True, slots=True)
class BlocksReply:
    headers: tuple[BlockHeader, ...]
    digests: bytes
    payload: Tensor


@dataclass(frozen=True, slots=True)
class EndReply:
    first_token: int | None
    extras: TokenExtras | None = None


@dataclass(frozen=True, slots=True)
class RefusalReply:
    kind: FailureKind
    reason: str


Reply: TypeAlias = BlocksReply | EndReply | RefusalReply


class ReadSession:
    def __init__(self, table: TicketTable, request: ReadRequest, loader: Loader) -> None:
        self.request = request
        self.is_over = False
        self._table = table
        self._loader = loader
        self._num_sent = 0
        first = request.first_head - table.window.heads.start
        self._heads = range(first, first + request.num_heads) if request.num_heads else range(0)
        self._max_blocks = loader.message_blocks(request.num_heads)

    @property
    def message_bytes(self) -> int:
        """The staging memory that `next_reply` needs."""
        return self._max_blocks * self._loader.block_bytes(self.request.num_heads)

    def next_reply(self, staging: Tensor) -> Reply | None:
        """What to send now, its payload in `staging`; None while the next blocks are not computed."""
        reply = self._refusal() or self._next_blocks(staging)
        self.is_over = isinstance(reply, EndReply | RefusalReply)
        return reply

    def _next_blocks(self, staging: Tensor) -> Reply | None:
        offered = self._table.find(self.request.ticket_id)
        if offered is None:
            return None
        if offered.prompt_digest != self.request.prompt_digest:
            return RefusalReply("refused", "prompt: the ticket is for other tokens")
        is_complete, end = offered.is_complete, EndReply(offered.first_token, offered.extras)
        headers = offered.headers(self._upcoming(offered)) if self._heads else []
        if not headers:
            return end if is_complete else None
        payload = staging[: len(headers) * self._loader.block_bytes(len(self._heads))]
        digests = offered.read(headers, self._heads, payload, self._loader)
        if digests is None:
            return None
        self._num_sent += len(headers)
        return BlocksReply(tuple(headers), digests, payload)

    def _upcoming(self, offered: OfferedBlocks) -> list[int]:
        if self.request.only:
            return list(self.request.only[self._num_sent : self._num_sent + self._max_blocks])
        start = self.request.first_block + self._num_sent
        return list(range(start, min(len(offered), start + self._max_blocks)))

    def _refusal(self) -> RefusalReply | None:
        difference = fingerprint_difference(self._table.fingerprint, self.request.fingerprint)
        if difference is not None:
            return RefusalReply("refused", difference)
        held = self._table.window.heads
        if self._heads and not (held.start <= self.request.first_head and self._heads.stop <= len(held)):
            return RefusalReply("refused", f"heads: this rank holds {held.start} to {held.stop - 1}")
        if self._table.is_closed(self.request.ticket_id):
            return RefusalReply("gone", "the ticket has been closed")
        return None
