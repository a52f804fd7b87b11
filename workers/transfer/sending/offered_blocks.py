"""`OfferedBlocks`: the blocks of one prompt on offer at one rank, with their digests; carriers read blocks through it.

The step loop adds blocks, carriers' threads read them. A read copies bytes out of the pool under the lock, so once
`withdraw` has returned, nothing reads the blocks any more and they may be freed. `BlockGenerations` counts
how often each pool block was released: a block with another generation holds another content and is never sent.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.read_request import BlockHeader
from tensorweave.workers.transfer.transports.loader import Loader
from tensorweave.workers.transfer.window import PoolWindow

Digests = npt.NDArray[np.int64]


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


class OfferedBlocks:
    """One ticket's blocks. Blocks are added chunk by chunk; the offer is complete once the first token is known, and
    can be read until it is closed."""

    def __init__(self, window: PoolWindow, generations: BlockGenerations, prompt_digest: str) -> None:
        self.prompt_digest = prompt_digest
        self.window = window
        self.first_token: int | None = None
        self.extras: TokenExtras | None = None
        self.is_complete = False
        self._generations = generations
        self._lock = threading.Lock()
        self._block_ids: list[int] = []
        self._headers: list[BlockHeader] = []
        self._digests_LK: list[Digests] = []

    def __len__(self) -> int:
        return len(self._headers)

    def add(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Digest these blocks as they are now, and put them on offer."""
        digests_NLK: Digests = self.window.digests(block_ids, num_tokens).numpy()
        generations = self._generations.acquire(block_ids)
        with self._lock:
            for generation, count in zip(generations, num_tokens, strict=True):
                self._headers.append(BlockHeader(len(self._headers), generation, count))
            self._block_ids += block_ids
            self._digests_LK += list(digests_NLK)

    def complete(self, first_token: int | None, extras: TokenExtras | None = None) -> None:
        self.first_token, self.extras = first_token, extras
        self.is_complete = True

    def withdraw(self) -> None:
        """Take all blocks off offer. They may be computed and added again."""
        with self._lock:
            self._generations.release(self._block_ids)
            self._block_ids, self._headers, self._digests_LK = [], [], []
            self.is_complete = False

    # ---- called by carriers

    def headers(self, indices: Sequence[int]) -> list[BlockHeader]:
        """The headers of those of these blocks that are on offer."""
        with self._lock:
            return [self._headers[index] for index in indices if index < len(self._headers)]

    def read(self, headers: Sequence[BlockHeader], heads: range, out: Tensor, loader: Loader) -> bytes | None:
        """Load the heads of these blocks into `out` and return their digests. None if a block is no longer the one that
        its header describes; `out` must not be used then."""
        with self._lock:
            if not self._are_current(headers):
                return None
            loader.pack([self._block_ids[header.index] for header in headers], heads, out)
            digests_NLK = np.stack([self._digests_LK[header.index] for header in headers])
            digests = digests_NLK[:, :, heads.start : heads.stop].astype("<i8", copy=False).tobytes()
            return digests if self._are_current(headers) else None

    def _are_current(self, headers: Sequence[BlockHeader]) -> bool:
        return all(
            header.index < len(self._headers)
            and self._headers[header.index] == header
            and self._generations.generation(self._block_ids[header.index]) == header.generation
            for header in headers
        )
