"""What lands at a taking rank: `Intake` checks the blocks of one claim, `Landing` is the only road into the pool.

Bytes are checked where they have arrived, before they are copied into the request's blocks: what is wrong never gets
there. Once `Landing.close` has returned, nothing writes into the blocks, and they may be freed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tensorweave.workers.transfer.shelf import Row
from tensorweave.workers.transfer.tally import Tally
from tensorweave.workers.transfer.window import PoolWindow


class Landing:
    """The blocks of one request that is being fetched: `block_ids` of the pool, from the prompt's block
    `first_block`."""

    def __init__(self, window: PoolWindow, first_block: int, block_ids: Sequence[int]) -> None:
        self.window = window
        self._first_block = first_block
        self._block_ids = tuple(block_ids)
        self._lock = threading.Lock()
        self._is_closed = False

    def write(self, indices: Sequence[int], heads: range, payload: Tensor) -> bool:
        """Copy packed blocks into the pool; False, and nothing is written, once it is closed."""
        with self._lock:
            if self._is_closed:
                return False
            self.window.unpack([self._block_ids[index - self._first_block] for index in indices], heads, payload)
            return True

    def close(self) -> None:
        with self._lock:
            self._is_closed = True


class Intake:
    """A `Sink`. `wanted` gives, for each block that is to come, how many of its tokens are the prompt's."""

    def __init__(self, landing: Landing, heads: range, wanted: Mapping[int, int], tally: Tally) -> None:
        self.verified: set[int] = set()
        self.heads = heads
        self._landing = landing
        self._wanted = wanted
        self._tally = tally
        self._announced: dict[int, tuple[Row, Tensor]] = {}
        self._faulted: set[int] = set()
        self._block_bytes = landing.window.block_bytes(len(heads))

    def announce(self, rows: Sequence[Row], digests: bytes) -> None:
        if len(digests) != 8 * len(rows) * self._landing.window.num_layers * len(self.heads):
            self._tally.fail("truncated", len(rows))
            return
        table = torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))
        shape = (len(rows), self._landing.window.num_layers, len(self.heads))
        for row, digest in zip(rows, table.view(shape), strict=True):
            self._announced[row.index] = (row, digest)

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        if len(payload) != len(blocks) * self._block_bytes:
            self._tally.fail("truncated", len(blocks))
            self._faulted.update(index for index, _ in blocks)
            return
        due = [at for at, (index, tag) in enumerate(blocks) if self._is_due(index, tag)]
        if not due:
            return
        rows = [self._announced[blocks[at][0]] for at in due]
        if len(due) < len(blocks):
            payload = payload.view(len(blocks), -1)[due].flatten()
        found = self._landing.window.payload_digests(payload, len(self.heads), [row.num_tokens for row, _ in rows])
        right = [at for at, (_, digest) in enumerate(rows) if torch.equal(found[at], digest)]
        if len(right) < len(rows):
            self._tally.fail("digest", len(rows) - len(right))
            self._faulted.update(row.index for row, _ in rows)
            payload = payload.view(len(rows), -1)[right].flatten()
        self._land([rows[at][0].index for at in right], payload)

    def missing(self) -> list[int]:
        """Blocks still to come, in order; those of which nothing was seen, right or wrong, are counted."""
        lacking = sorted(self._wanted.keys() - self.verified)
        unseen = [index for index in lacking if index not in self._faulted]
        self._tally.fail("missing", len(unseen))
        self._faulted.clear()
        return lacking

    def num_verified(self) -> int:
        """Blocks without a gap from the first."""
        return next((i for i, index in enumerate(self._wanted) if index not in self.verified), len(self._wanted))

    def _is_due(self, index: int, tag: int) -> bool:
        """Whether this block is wanted, still, and is the one that was announced."""
        if index in self.verified:
            self._tally.fail("duplicate")
            return False
        row = self._announced[index][0] if index in self._announced else None
        if row is None or row.tag != tag or row.num_tokens != self._wanted.get(index):
            self._tally.fail("stale")
            self._faulted.add(index)
            return False
        return True

    def _land(self, indices: Sequence[int], payload: Tensor) -> None:
        if not indices:
            return
        if self._landing.write(indices, self.heads, payload):
            self.verified.update(indices)
            self._tally.add("blocks", len(indices))
            self._tally.add("bytes", len(payload))
        else:
            self._tally.fail("late", len(indices))
