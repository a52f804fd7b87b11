"""Cursors: what a read request has been sent of an offer, and what comes next. Packed bytes of whole blocks, or parts:
where some layers of some blocks lie, for receivers that read the sender's pool themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol, TypeAlias

from torch import Tensor

from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.read_request import BlockHeader, ReadRequest
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks, OfferedPart
from tensorweave.workers.transfer.transports.loader import Loader
from tensorweave.workers.transfer.window import PoolWindow


@dataclass(frozen=True, slots=True)
class BlocksReply:
    headers: tuple[BlockHeader, ...]
    digests: bytes
    payload: Tensor


BlocksOrPart: TypeAlias = BlocksReply | BlockPart


class BlockCursor(Protocol):
    @property
    def message_bytes(self) -> int:
        """The staging memory that `next_blocks` needs."""

    def next_blocks(self, offered: OfferedBlocks, staging: Tensor) -> BlocksOrPart | None:
        """What to send now; None while nothing more is computed."""


def requested_heads(request: ReadRequest, window: PoolWindow) -> range:
    """As this rank counts them, from its own first head."""
    first = request.first_head - window.heads.start
    return range(first, first + request.num_heads) if request.num_heads else range(0)


class PackedCursor:
    """Packed bytes of whole blocks."""

    def __init__(self, request: ReadRequest, heads: range, loader: Loader) -> None:
        self._request = request
        self._heads = heads
        self._loader = loader
        self._num_sent = 0
        self._max_blocks = loader.message_blocks(len(heads))

    @property
    def message_bytes(self) -> int:
        return self._max_blocks * self._loader.block_bytes(len(self._heads))

    def next_blocks(self, offered: OfferedBlocks, staging: Tensor) -> BlocksReply | None:
        headers = offered.headers(self._upcoming(offered)) if self._heads else []
        if not headers:
            return None
        payload = staging[: len(headers) * self._loader.block_bytes(len(self._heads))]
        digests = offered.read(headers, self._heads, payload, self._loader)
        if digests is None:
            return None
        self._num_sent += len(headers)
        return BlocksReply(tuple(headers), digests, payload)

    def _upcoming(self, offered: OfferedBlocks) -> list[int]:
        if self._request.only:
            return list(self._request.only[self._num_sent : self._num_sent + self._max_blocks])
        start = self._request.first_block + self._num_sent
        return list(range(start, min(offered.num_complete, start + self._max_blocks)))


class PartCursor:
    """Parts as they become ready; if several layers of the same blocks wait, in one message, as far as it holds them.
    Blocks that were sent with all layers are not sent again after a withdrawal."""

    message_bytes = 0

    def __init__(self, request: ReadRequest, heads: range, window: PoolWindow, message_bytes: int) -> None:
        self._request = request
        self._heads = heads
        self._num_layers = window.num_layers
        self._layer_blocks = max(1, message_bytes * window.num_layers // max(1, window.block_bytes(len(heads))))
        self._epoch = 0
        self._next_part = 0
        self._is_part_begun = False
        self._next_block = request.first_block
        self._first_block = request.first_block
        self._num_sent = 0

    def next_blocks(self, offered: OfferedBlocks, staging: Tensor) -> BlockPart | None:
        if not self._heads:
            return None
        return self._next_named(offered) if self._request.only else self._next_part_of(offered)

    def _next_named(self, offered: OfferedBlocks) -> BlockPart | None:
        epoch = offered.epoch
        named = self._request.only[self._num_sent : self._num_sent + self._most_blocks(self._num_layers)]
        blocks = list(takewhile(lambda index: index < offered.num_complete, named))
        if not blocks:
            return None
        part = offered.describe(epoch, blocks, range(self._num_layers), self._heads)
        self._num_sent += 0 if part is None else len(blocks)
        return part

    def _next_part_of(self, offered: OfferedBlocks) -> BlockPart | None:
        parts = offered.parts(self._epoch, self._next_part)
        if parts is None:
            self._epoch, self._next_part, self._next_block = offered.epoch, 0, self._first_block
            self._is_part_begun = False
            return self._next_part_of(offered)
        at = 0
        while at < len(parts):
            ready, start = parts[at], max(self._next_block, parts[at].blocks.start)
            num_merged = self._num_merged(parts[at:], start)
            layers = range(ready.layers.start, parts[at + num_merged - 1].layers.stop)
            ready = OfferedPart(ready.blocks, layers)
            blocks = range(start, min(ready.blocks.stop, start + self._most_blocks(len(layers))))
            if blocks:
                part = offered.describe(self._epoch, blocks, layers, self._heads)
                if part is not None:
                    self._pass(ready, blocks.stop, num_merged)
                return part
            self._pass(ready, ready.blocks.stop, num_merged)
            at += num_merged
        return None

    def _num_merged(self, parts: Sequence[OfferedPart], start: int) -> int:
        """How many of the parts, at least the first, are of the same blocks and fit in one message from `start` on. If
        the first has been sent in part, the rest of it goes alone."""
        first, count = parts[0], 1
        if self._is_part_begun:
            return 1
        for part in parts[1:]:
            num_layers = part.layers.stop - first.layers.start
            if part.blocks != first.blocks or first.blocks.stop - start > self._most_blocks(num_layers):
                break
            count += 1
        return count

    def _pass(self, ready: OfferedPart, stop: int, num_merged: int) -> None:
        """The blocks before `stop` of a part, or of several as one, were sent."""
        self._is_part_begun = stop < ready.blocks.stop
        if self._is_part_begun:
            self._next_block = stop
            return
        self._next_part += num_merged
        if ready.layers.stop == self._num_layers:
            self._first_block = max(self._first_block, ready.blocks.stop)
        self._next_block = self._first_block

    def _most_blocks(self, num_layers: int) -> int:
        return max(1, self._layer_blocks // num_layers)
