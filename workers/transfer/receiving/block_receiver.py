"""`BlockReceiver` verifies the blocks of one read request; `TargetBlocks` alone writes them into the pool.

On a CPU packed bytes are verified where they were received, layer by layer while they are in the cache, before they are
copied into the request's blocks. On a GPU packed bytes, and parts of a sender's pool, are copied straight into the
request's blocks, which nothing reads before the fetch has ended, and verified by the digests of what was written: a
block counts once all of its layers are right, and is computed here if it does not. Once `TargetBlocks.close` has
returned, nothing writes into the blocks, and they may be freed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from tensorweave.kernels.blocks.reference import SomeBlocks
from tensorweave.workers.transfer.block_part import BlockPart, Digests
from tensorweave.workers.transfer.block_sink import FinishCopy
from tensorweave.workers.transfer.read_request import BlockHeader
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.window import PoolWindow, RunningCopy


class TargetBlocks:
    """The pool blocks of a request that is being fetched. `block_ids` begin at the prompt's block `first_block`."""

    def __init__(self, window: PoolWindow, first_block: int, block_ids: Sequence[int]) -> None:
        self.window = window
        self._first_block = first_block
        self._block_ids = tuple(block_ids)
        self._lock = threading.Lock()
        self._is_closed = False
        self._copies: list[RunningCopy] = []

    def write(
        self, headers: Sequence[BlockHeader], heads: range, payload: Tensor, digests_NLK: Digests
    ) -> list[bool] | None:
        """Copy packed blocks into the pool, and return which ones match their digests; on a CPU only those are
        written. After `close`, write nothing and return None."""
        with self._lock:
            if self._is_closed:
                return None
            block_ids = [self._block_ids[header.index - self._first_block] for header in headers]
            num_tokens = [header.num_tokens for header in headers]
            return self.window.write_verified(block_ids, heads, payload, num_tokens, digests_NLK)

    def pull(self, part: BlockPart, pool_LB2KPH: Tensor, source_heads: range, heads: range) -> RunningCopy | None:
        """Begin to copy these blocks, whose indices are in range, from a pool. After `close`, write nothing and return
        None."""
        indices, num_tokens, source_ids = (part.rows_N4[:, column].tolist() for column in (0, 2, 3))
        with self._lock:
            if self._is_closed:
                return None
            block_ids = [self._block_ids[index - self._first_block] for index in indices]
            source = SomeBlocks(pool_LB2KPH, source_ids, source_heads)
            copy = self.window.pull(source, block_ids, heads, num_tokens, part.layers)
            self._copies.append(copy)
            return copy

    def end_copy(self, copy: RunningCopy) -> Digests:
        """Wait for it, and return the digests of what was copied."""
        found_NLK = copy.wait()
        with self._lock:
            self._copies = [other for other in self._copies if other is not copy]
        return found_NLK

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            copies, self._copies = self._copies, []
        for copy in copies:
            copy.wait()


@dataclass(slots=True)
class _BlockLayers:
    """The layers of a block that are not verified. Those of another generation do not count."""

    generation: int
    missing: set[int]


def _nothing() -> None:
    """The end of a copy that was not begun."""


class BlockReceiver:
    """A `BlockSink`. `wanted` maps the index of each block that must arrive to how many of its tokens belong to the
    prompt."""

    def __init__(self, target: TargetBlocks, heads: range, wanted: Mapping[int, int], stats: TransferStats) -> None:
        self.verified: set[int] = set()
        self.heads = heads
        self._target = target
        self._wanted = wanted
        self._stats = stats
        self._announced: dict[int, tuple[BlockHeader, Digests]] = {}
        self._layers: dict[int, _BlockLayers] = {}
        self._rejected: set[int] = set()
        self._block_bytes = target.window.block_bytes(len(heads))

    def announce(self, headers: Sequence[BlockHeader], digests: bytes) -> None:
        shape = (len(headers), self._target.window.num_layers, len(self.heads))
        if len(digests) != 8 * np.prod(shape):
            self._stats.add_failures("truncated", len(headers))
            return
        digests_NLK = np.frombuffer(digests, dtype="<i8").astype(np.int64).reshape(shape)
        for header, digests_LK in zip(headers, digests_NLK, strict=True):
            self._announced[header.index] = (header, digests_LK)

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        if len(payload) != len(blocks) * self._block_bytes:
            self._stats.add_failures("truncated", len(blocks))
            self._rejected.update(index for index, _ in blocks)
            return
        due = [at for at, (index, generation) in enumerate(blocks) if self._check_due(index, generation)]
        if not due:
            return
        if len(due) < len(blocks):
            payload = payload.view(len(blocks), -1)[due].flatten()
        announced = [self._announced[blocks[at][0]] for at in due]
        headers = [header for header, _ in announced]
        is_valid = self._target.write(headers, self.heads, payload, np.stack([digests for _, digests in announced]))
        if is_valid is None:
            self._stats.add_failures("late", len(headers))
            return
        valid = [header.index for header, flag in zip(headers, is_valid, strict=True) if flag]
        invalid = [header.index for header, flag in zip(headers, is_valid, strict=True) if not flag]
        self.verified.update(valid)
        self._rejected.update(invalid)
        self._stats.add_failures("digest", len(invalid))
        self._stats.add_verified(len(valid), len(valid) * self._block_bytes)

    def pull(self, part: BlockPart, pool_LB2KPH: Tensor, heads: range) -> FinishCopy:
        rows = part.rows_N4.tolist()
        due = [at for at, (index, _, num_tokens, _) in enumerate(rows) if self._check_part_due(index, num_tokens)]
        copy = None
        if due:
            part = part if len(due) == len(rows) else part.chosen(np.array(due))
            copy = self._target.pull(part, pool_LB2KPH, heads, self.heads)
            if copy is None:
                self._stats.add_failures("late", len(due))
        return _nothing if copy is None else partial(self._end_part, part, copy)

    def _end_part(self, part: BlockPart, copy: RunningCopy) -> None:
        found_NLK = self._target.end_copy(copy)
        is_right = (found_NLK == part.digests_NLK).all(axis=(1, 2)).tolist()
        num_verified = 0
        for (index, generation, _, _), flag in zip(part.rows_N4.tolist(), is_right, strict=True):
            layers = self._layers.get(index)
            if layers is None or layers.generation != generation:
                layers = self._layers[index] = _BlockLayers(generation, set(range(self._target.window.num_layers)))
            if flag:
                layers.missing.difference_update(part.layers)
            else:
                layers.missing.update(part.layers)
                self._rejected.add(index)
            if not layers.missing:
                self.verified.add(index)
                num_verified += 1
            else:
                self.verified.discard(index)
        self._stats.add_failures("digest", len(is_right) - sum(is_right))
        self._stats.add_verified(num_verified, num_verified * self._block_bytes)

    def take_missing(self) -> list[int]:
        """Return the blocks that must still arrive, in order, and count those of which nothing was received."""
        missing = sorted(self._wanted.keys() - self.verified)
        self._stats.add_failures("missing", len(set(missing) - self._rejected))
        self._rejected.clear()
        return missing

    def num_leading_verified(self) -> int:
        """How many blocks are verified without a gap, from the first."""
        return next((i for i, index in enumerate(self._wanted) if index not in self.verified), len(self._wanted))

    def _check_part_due(self, index: int, num_tokens: int) -> bool:
        if index in self.verified:
            self._stats.add_failures("duplicate")
            return False
        if num_tokens != self._wanted.get(index):
            self._stats.add_failures("stale")
            self._rejected.add(index)
            return False
        return True

    def _check_due(self, index: int, generation: int) -> bool:
        """Return whether this block is still wanted and is the one that was announced; count it if not."""
        if index in self.verified:
            self._stats.add_failures("duplicate")
            return False
        header = self._announced[index][0] if index in self._announced else None
        if header is None or header.generation != generation or header.num_tokens != self._wanted.get(index):
            self._stats.add_failures("stale")
            self._rejected.add(index)
            return False
        return True
