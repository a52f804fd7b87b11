"""`OfferedBlocks`: the blocks of one prompt on offer at one rank, with their digests; carriers read blocks through it.

The step loop adds blocks, carriers' threads read them. A read copies bytes out of the pool under the lock, so once
`withdraw` has returned, nothing reads the blocks any more and they may be freed. `BlockGenerations` counts
how often each pool block was released: a block with another generation holds another content and is never sent.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tensorweave.kernels.blocks.digest import combine_digests
from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.block_part import BlockPart, Digests
from tensorweave.workers.transfer.read_request import BlockHeader
from tensorweave.workers.transfer.transports.loader import Loader
from tensorweave.workers.transfer.window import PoolWindow


class BlockGenerations:
    """A generation number per pool block, incremented when the last offer that holds the block releases it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generations: collections.Counter[int] = collections.Counter()
        self._num_holders: collections.Counter[int] = collections.Counter()

    def generation(self, block_id: int) -> int:
        return self._generations[block_id]

    @property
    def num_held(self) -> int:
        return len(self._num_holders)

    def acquire(self, block_ids: Sequence[int]) -> list[int]:
        """Hold these blocks; return their generations."""
        with self._lock:
            self._num_holders.update(block_ids)
            return [self._generations[block_id] for block_id in block_ids]

    def release(self, block_ids: Sequence[int]) -> None:
        with self._lock:
            for block_id in block_ids:
                self._num_holders[block_id] -= 1
                if not self._num_holders[block_id]:
                    del self._num_holders[block_id]
                    self._generations[block_id] += 1


@dataclass(frozen=True, slots=True)
class OfferedPart:
    """Layers of blocks that have become ready together. The last part of blocks has their last layer; only then are
    they complete."""

    blocks: range
    layers: range


class OfferedBlocks:
    """One ticket's blocks. Blocks are added chunk by chunk, with all layers or layer by layer; the offer is complete
    once the first token is known, and can be read until it is closed.

    `epoch` counts withdrawals: what was begun before one is of no use after it.
    """

    def __init__(self, window: PoolWindow, generations: BlockGenerations, prompt_digest: str) -> None:
        self.prompt_digest = prompt_digest
        self.window = window
        self.first_token: int | None = None
        self.extras: TokenExtras | None = None
        self.has_token = False
        self.epoch = 0
        self._generations = generations
        self._lock = threading.Lock()
        self._block_ids: list[int] = []
        self._headers: list[BlockHeader] = []
        self._rows_N4 = np.zeros((0, 4), np.int64)
        self._digests_NLK = np.zeros((0, window.num_layers, len(window.heads)), np.int64)
        self._parts: list[OfferedPart] = []
        self._num_complete = 0

    def __len__(self) -> int:
        """How many blocks are on offer, or will be once all of their layers are computed."""
        return len(self._headers)

    @property
    def num_complete(self) -> int:
        """How many blocks are on offer with all layers; no other block comes before them."""
        return self._num_complete

    @property
    def is_complete(self) -> bool:
        """Whether no more blocks will come, and the first token is known."""
        return self.has_token and self._num_complete == len(self._headers)

    def add(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Compute the digests of these blocks, which then are on offer with all layers."""
        digests_NLK = self.window.digests(block_ids, num_tokens).numpy()
        first, layers = len(self), range(self.window.num_layers)
        epoch = self.begin(block_ids, num_tokens)
        self.add_layers(epoch, range(first, first + len(block_ids)), layers, digests_NLK)

    def begin(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> int:
        """Hold these blocks, whose layers are going to be added, and return the epoch."""
        generations = self._generations.acquire(block_ids)
        with self._lock:
            indices = range(len(self._headers), len(self._headers) + len(block_ids))
            self._headers += map(BlockHeader, indices, generations, num_tokens)
            self._block_ids += block_ids
            rows = np.array([indices, generations, num_tokens, block_ids], np.int64).T
            self._rows_N4 = np.concatenate([self._rows_N4, rows])
            more = np.zeros((len(block_ids), *self._digests_NLK.shape[1:]), np.int64)
            self._digests_NLK = np.concatenate([self._digests_NLK, more])
            return self.epoch

    def add_layers(self, epoch: int, blocks: range, layers: range, digests_NLK: Digests) -> bool:
        """Offer these layers of blocks that were begun; layers in order. The digests were computed after `begin`: if
        the blocks have been withdrawn meanwhile, they may be of other content, and nothing is offered."""
        with self._lock:
            if epoch != self.epoch:
                return False
            self._digests_NLK[blocks.start : blocks.stop, layers.start : layers.stop] = digests_NLK
            if blocks:
                self._parts.append(OfferedPart(blocks, layers))
            if layers.stop == self.window.num_layers:
                self._num_complete = max(self._num_complete, blocks.stop)
            return True

    def complete(self, first_token: int | None, extras: TokenExtras | None = None) -> None:
        self.first_token, self.extras = first_token, extras
        self.has_token = True

    def withdraw(self) -> None:
        """Take all blocks off offer. They may be computed and added again."""
        with self._lock:
            self._generations.release(self._block_ids)
            self._block_ids, self._headers, self._parts = [], [], []
            self._rows_N4, self._digests_NLK = self._rows_N4[:0], self._digests_NLK[:0]
            self._num_complete = 0
            self.has_token = False
            self.epoch += 1

    # ---- called by carriers

    def headers(self, indices: Sequence[int]) -> list[BlockHeader]:
        """The headers of those of these blocks that are on offer with all layers."""
        with self._lock:
            return [self._headers[index] for index in indices if index < self._num_complete]

    def read(self, headers: Sequence[BlockHeader], heads: range, out: Tensor, loader: Loader) -> bytes | None:
        """Load the heads of these blocks into `out` and return their digests. None if a block is no longer the one that
        its header describes; `out` must not be used then."""
        with self._lock:
            if not self._are_current(headers):
                return None
            loader.pack([self._block_ids[header.index] for header in headers], heads, out)
            digests_NLK = self._digests_NLK[[header.index for header in headers]]
            digests = digests_NLK[:, :, heads.start : heads.stop].astype("<i8", copy=False).tobytes()
            return digests if self._are_current(headers) else None

    def parts(self, epoch: int, first: int) -> Sequence[OfferedPart] | None:
        """The parts from the `first` on; None if the epoch is over."""
        with self._lock:
            return self._parts[first:] if epoch == self.epoch else None

    def describe(self, epoch: int, blocks: Sequence[int], layers: range, heads: range) -> BlockPart | None:
        """Where these blocks lie, and digests of these layers and heads; None if the epoch is over: until then, the
        blocks are held."""
        with self._lock:
            if epoch != self.epoch:
                return None
            chosen = slice(blocks.start, blocks.stop) if isinstance(blocks, range) else list(blocks)
            digests_NLK = self._digests_NLK[chosen, layers.start : layers.stop, heads.start : heads.stop]
            return BlockPart(layers, np.column_stack([self._rows_N4[chosen], combine_digests(digests_NLK)]))

    def _are_current(self, headers: Sequence[BlockHeader]) -> bool:
        return all(
            header.index < len(self._headers)
            and self._headers[header.index] == header
            and self._generations.generation(self._block_ids[header.index]) == header.generation
            for header in headers
        )
