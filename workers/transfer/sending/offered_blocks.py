"""`OfferedBlocks`: the blocks of one prompt on offer at one rank, with their digests; what carriers read them through.

Filled by the step loop, read by carriers' threads. A read copies bytes out of the pool under their lock, so that
once `close` or `retract` has returned, nobody reads the blocks any more and they may be freed. `BlockTags` counts each
pool block's generations: a block that lost its last holder has another tag, and is never given as what it was.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.transports.loader import Loader
from tensorweave.workers.transfer.window import PoolWindow

Digests = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """A block on offer: its place in the prompt, its generation, and how many of its tokens are the prompt's."""

    index: int
    tag: int
    num_tokens: int


class BlockTags:
    """A generation number for each pool block, counted up when the last offered that holds the block lets it go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tags: collections.Counter[int] = collections.Counter()
        self._holders: collections.Counter[int] = collections.Counter()

    def tag(self, block_id: int) -> int:
        return self._tags[block_id]

    @property
    def num_held(self) -> int:
        return len(self._holders)

    def hold(self, block_ids: Sequence[int]) -> list[int]:
        with self._lock:
            self._holders.update(block_ids)
            return [self._tags[block_id] for block_id in block_ids]

    def let_go(self, block_ids: Sequence[int]) -> None:
        with self._lock:
            for block_id in block_ids:
                self._holders[block_id] -= 1
                if not self._holders[block_id]:
                    del self._holders[block_id]
                    self._tags[block_id] += 1


class OfferedBlocks:
    """One ticket's blocks: grows chunk by chunk, complete once the first token is known, then read until closed."""

    def __init__(self, window: PoolWindow, tags: BlockTags, prompt: str) -> None:
        self.prompt = prompt
        self.window = window
        self.first_token: int | None = None
        self.extras: TokenExtras | None = None
        self.is_complete = False
        self.is_closed = False
        self._tags = tags
        self._lock = threading.Lock()
        self._block_ids: list[int] = []
        self._rows: list[Row] = []
        self._digests_LK: list[Digests] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Digest these blocks, as they now are, and put them on offer."""
        digests_NLK: Digests = self.window.digests(block_ids, num_tokens).numpy()
        tags = self._tags.hold(block_ids)
        with self._lock:
            for tag, count in zip(tags, num_tokens, strict=True):
                self._rows.append(Row(len(self._rows), tag, count))
            self._block_ids += block_ids
            self._digests_LK += list(digests_NLK)

    def complete(self, first_token: int | None, extras: TokenExtras | None = None) -> None:
        self.first_token, self.extras = first_token, extras
        self.is_complete = True

    def retract(self) -> None:
        """The blocks are taken away, and will be computed and added again."""
        with self._lock:
            self._tags.let_go(self._block_ids)
            self._block_ids, self._rows, self._digests_LK = [], [], []
            self.is_complete = False

    def close(self) -> None:
        self.is_closed = True
        self.retract()

    # ---- for carriers

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """Those of these blocks, in order, that are on offer by now, up to the first that is not."""
        with self._lock:
            return [self._rows[index] for index in indices if index < len(self._rows)]

    def read(self, rows: Sequence[Row], heads: range, out: Tensor, loader: Loader | None = None) -> bytes | None:
        """Load the heads of these blocks into `out`; returns their digests, or None where a block is not there any more
        as the row names it (nothing in `out` may be used then)."""
        with self._lock:
            if not self._stand(rows):
                return None
            (loader or self.window).pack([self._block_ids[row.index] for row in rows], heads, out)
            digests_NLK = np.stack([self._digests_LK[row.index] for row in rows])[:, :, heads.start : heads.stop]
            return digests_NLK.astype("<i8", copy=False).tobytes() if self._stand(rows) else None

    def _stand(self, rows: Sequence[Row]) -> bool:
        return all(
            row.index < len(self._rows)
            and self._rows[row.index] == row
            and self._tags.tag(self._block_ids[row.index]) == row.tag
            for row in rows
        )
