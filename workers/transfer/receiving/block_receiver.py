"""What lands at a taking rank: `Intake` checks the blocks of one claim, `TargetBlocks` is the only link into the pool.

Bytes are checked where they have arrived, before they are copied into the request's blocks (on a CPU layer by layer,
while they are in the cache): what is wrong never gets there. Once `TargetBlocks.close` has returned, nothing writes
into the blocks, and they may be freed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tensorweave.workers.transfer.sending.offered_blocks import Digests, Row
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.window import PoolWindow


class TargetBlocks:
    """The blocks of one request that is being fetched: `block_ids` of the pool, from the prompt's block
    `first_block`."""

    def __init__(self, window: PoolWindow, first_block: int, block_ids: Sequence[int]) -> None:
        self.window = window
        self._first_block = first_block
        self._block_ids = tuple(block_ids)
        self._lock = threading.Lock()
        self._is_closed = False

    def write(self, rows: Sequence[Row], heads: range, payload: Tensor, digests_NLK: Digests) -> list[bool] | None:
        """Copy those packed blocks into the pool that have these digests, and say which; None, and nothing is written,
        once it is closed."""
        with self._lock:
            if self._is_closed:
                return None
            block_ids = [self._block_ids[row.index - self._first_block] for row in rows]
            return self.window.land(block_ids, heads, payload, [row.num_tokens for row in rows], digests_NLK)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True


class Intake:
    """A `Sink`. `wanted` gives, for each block that is to come, how many of its tokens are the prompt's."""

    def __init__(self, arrival: TargetBlocks, heads: range, wanted: Mapping[int, int], stats: TransferStats) -> None:
        self.verified: set[int] = set()
        self.heads = heads
        self._arrival = arrival
        self._wanted = wanted
        self._stats = stats
        self._announced: dict[int, tuple[Row, Digests]] = {}
        self._faulted: set[int] = set()
        self._block_bytes = arrival.window.block_bytes(len(heads))

    def announce(self, rows: Sequence[Row], digests: bytes) -> None:
        if len(digests) != 8 * len(rows) * self._arrival.window.num_layers * len(self.heads):
            self._stats.fail("truncated", len(rows))
            return
        table = np.frombuffer(digests, dtype="<i8").astype(np.int64)
        shape = (len(rows), self._arrival.window.num_layers, len(self.heads))
        for row, digest in zip(rows, table.reshape(shape), strict=True):
            self._announced[row.index] = (row, digest)

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        if len(payload) != len(blocks) * self._block_bytes:
            self._stats.fail("truncated", len(blocks))
            self._faulted.update(index for index, _ in blocks)
            return
        due = [at for at, (index, tag) in enumerate(blocks) if self._is_due(index, tag)]
        if not due:
            return
        announced = [self._announced[blocks[at][0]] for at in due]
        if len(due) < len(blocks):
            payload = payload.view(len(blocks), -1)[due].flatten()
        rows = [row for row, _ in announced]
        is_right = self._arrival.write(rows, self.heads, payload, np.stack([digests for _, digests in announced]))
        if is_right is None:
            self._stats.fail("late", len(rows))
            return
        right = [row.index for row, flag in zip(rows, is_right, strict=True) if flag]
        wrong = [row.index for row, flag in zip(rows, is_right, strict=True) if not flag]
        self.verified.update(right)
        self._faulted.update(wrong)
        self._stats.fail("digest", len(wrong))
        self._stats.land(len(right), len(right) * self._block_bytes)

    def missing(self) -> list[int]:
        """Blocks still to come, in order; those of which nothing was seen, right or wrong, are counted."""
        lacking = sorted(self._wanted.keys() - self.verified)
        unseen = [index for index in lacking if index not in self._faulted]
        self._stats.fail("missing", len(unseen))
        self._faulted.clear()
        return lacking

    def num_verified(self) -> int:
        """Blocks without a gap from the first."""
        return next((i for i, index in enumerate(self._wanted) if index not in self.verified), len(self._wanted))

    def _is_due(self, index: int, tag: int) -> bool:
        """Whether this block is wanted, still, and is the one that was announced."""
        if index in self.verified:
            self._stats.fail("duplicate")
            return False
        row = self._announced[index][0] if index in self._announced else None
        if row is None or row.tag != tag or row.num_tokens != self._wanted.get(index):
            self._stats.fail("stale")
            self._faulted.add(index)
            return False
        return True
