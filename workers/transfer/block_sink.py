"""`BlockSink`: what a carrier hands received blocks to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.read_request import BlockHeader

FinishCopy: TypeAlias = Callable[[], None]
"""Waits for a copy that was begun, and verifies it. Called once, on any thread."""


class BlockSink(Protocol):
    """Takes the blocks of one read request. Called on a carrier's threads, one call at a time."""

    def announce(self, headers: Sequence[BlockHeader], digests: bytes) -> None:
        """These blocks come next. `digests` are [blocks, layers, heads of the read] int64, little-endian."""

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        """Take the packed bytes (see `PoolWindow`) of the blocks with these (index, generation). The carrier reuses
        `payload` after the call."""

    def pull(self, part: BlockPart, pool_LB2KPH: Tensor, heads: range) -> FinishCopy:
        """Begin to copy these blocks from the sender's pool, which this rank's device can read; `heads` are the read's
        as the sender counts them."""
