"""`ReadSession`: one read request while a carrier serves it, and the replies that it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.carrier import FailureKind
from tensorweave.workers.transfer.fingerprint import fingerprint_difference
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlockCursor, BlocksOrPart
from tensorweave.workers.transfer.sending.ticket_table import TicketTable


@dataclass(frozen=True, slots=True)
class EndReply:
    first_token: int | None
    extras: TokenExtras | None = None


@dataclass(frozen=True, slots=True)
class RefusalReply:
    kind: FailureKind
    reason: str


Reply: TypeAlias = BlocksOrPart | EndReply | RefusalReply


class ReadSession:
    def __init__(self, table: TicketTable, request: ReadRequest, cursor: BlockCursor) -> None:
        self.request = request
        self.is_over = False
        self._table = table
        self._cursor = cursor

    @property
    def message_bytes(self) -> int:
        """The staging memory that `next_reply` needs."""
        return self._cursor.message_bytes

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
        blocks = self._cursor.next_blocks(offered, staging)
        if blocks is None and is_complete and offered.is_complete:
            return end
        return blocks

    def _refusal(self) -> RefusalReply | None:
        difference = fingerprint_difference(self._table.fingerprint, self.request.fingerprint)
        if difference is not None:
            return RefusalReply("refused", difference)
        held, first = self._table.window.heads, self.request.first_head
        if self.request.num_heads and not (held.start <= first and first + self.request.num_heads <= held.stop):
            return RefusalReply("refused", f"heads: this rank holds {held.start} to {held.stop - 1}")
        if self._table.is_closed(self.request.ticket_id):
            return RefusalReply("gone", "the ticket has been closed")
        return None
