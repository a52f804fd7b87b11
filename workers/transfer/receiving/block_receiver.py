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
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tensorweave.kernels.blocks.digest import combine_digests
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
        indices, _, num_tokens, source_ids, _ = part.rows_N5.T.tolist()
        first, ours = self._first_block, self._block_ids
        with self._lock:
            if self._is_closed:
                return None
            block_ids = [ours[index - first] for index in indices]
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


def _as_slice(rows_N: Digests) -> Digests | slice:
    """Rows that follow each other, as they do as a rule, are found several times as fast by a slice."""
    first, last = int(rows_N[0]), int(rows_N[-1])
    if last - first == len(rows_N) - 1 and bool((rows_N[1:] > rows_N[:-1]).all()):
        return slice(first, last + 1)
    return rows_N


def _nothing() -> None:
    """The end of a copy that was not begun."""


class _Progress:
    """Which of the wanted blocks are verified, and which of their layers. What was received of another generation of a
    block does not count.

    Blocks are rows from the first wanted one to the last. Parts have hundreds of blocks, so all is in arrays."""

    def __init__(self, wanted: Mapping[int, int], num_layers: int) -> None:
        self._first = min(wanted, default=0)
        num_rows = max(wanted) + 1 - self._first if wanted else 0
        self._rows = np.fromiter(wanted, np.int64, len(wanted)) - self._first
        """Of the wanted blocks, in order."""
        self._tokens_N = np.full(num_rows, -1, np.int64)
        self._tokens_N[self._rows] = np.fromiter(wanted.values(), np.int64, len(wanted))
        self._is_verified_N = np.zeros(num_rows, bool)
        self._is_rejected_N = np.zeros(num_rows, bool)
        self._generations_N = np.zeros(num_rows, np.int64)
        self._is_missing_NL = np.ones((num_rows, num_layers), bool)

    def judge(self, indices_N: Digests, num_tokens_N: Digests) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which of these blocks are verified already, and which others are wanted with as many tokens."""
        rows_N = indices_N - self._first
        is_known_N = (rows_N >= 0) & (rows_N < len(self._tokens_N))
        if not is_known_N.any():
            return is_known_N, is_known_N
        rows = _as_slice(np.where(is_known_N, rows_N, 0))
        is_double_N = is_known_N & self._is_verified_N[rows]
        is_due_N = is_known_N & ~is_double_N & (num_tokens_N > 0) & (self._tokens_N[rows] == num_tokens_N)
        if not is_due_N.all():
            self._is_rejected_N[rows_N[is_known_N & ~is_due_N & ~is_double_N]] = True
        return is_double_N, is_due_N

    def note_layers(self, part: BlockPart, is_right_N: npt.NDArray[np.bool_]) -> int:
        """These layers of blocks, all of them wanted, are right or not; return how many of the blocks are verified."""
        rows_N, generations_N = part.rows_N5[:, 0] - self._first, part.rows_N5[:, 1]
        rows = _as_slice(rows_N)
        is_new_N = self._generations_N[rows] != generations_N
        if is_new_N.any():
            self._is_missing_NL[rows_N[is_new_N]] = True
            self._generations_N[rows] = generations_N
        self._is_missing_NL[rows, part.layers.start : part.layers.stop] = ~is_right_N[:, None]
        if not is_right_N.all():
            self._is_rejected_N[rows_N[~is_right_N]] = True
        is_verified_N = ~self._is_missing_NL[rows].any(axis=1)
        self._is_verified_N[rows] = is_verified_N
        return int(is_verified_N.sum())

    def note_blocks(self, valid: Sequence[int], invalid: Sequence[int]) -> None:
        """These whole blocks, all of them wanted, are right or not."""
        self._is_verified_N[np.array(valid, np.int64) - self._first] = True
        self._is_rejected_N[np.array(invalid, np.int64) - self._first] = True

    def reject(self, indices: Sequence[int]) -> None:
        rows = np.array(indices, np.int64) - self._first
        self._is_rejected_N[rows[(rows >= 0) & (rows < len(self._tokens_N))]] = True

    def take_missing(self) -> tuple[list[int], int]:
        """The wanted blocks that are not verified, in order, and of how many of them nothing was received since the
        last call."""
        rows = np.sort(self._rows[~self._is_verified_N[self._rows]])
        num_silent = len(rows) - int(self._is_rejected_N[rows].sum())
        self._is_rejected_N[:] = False
        return (rows + self._first).tolist(), num_silent

    def num_leading_verified(self) -> int:
        is_verified_N = self._is_verified_N[self._rows]
        return len(is_verified_N) if is_verified_N.all() else int(is_verified_N.argmin())


class BlockReceiver:
    """A `BlockSink`. `wanted` maps the index of each block that must arrive to how many of its tokens belong to the
    prompt."""

    def __init__(self, target: TargetBlocks, heads: range, wanted: Mapping[int, int], stats: TransferStats) -> None:
        self.heads = heads
        self._target = target
        self._progress = _Progress(wanted, target.window.num_layers)
        self._stats = stats
        self._announced: dict[int, tuple[BlockHeader, Digests]] = {}
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
            self._progress.reject([index for index, _ in blocks])
            return
        due = self._due(blocks)
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
        self._progress.note_blocks(valid, invalid)
        self._stats.add_failures("digest", len(invalid))
        self._stats.add_verified(len(valid), len(valid) * self._block_bytes)

    def pull(self, part: BlockPart, pool_LB2KPH: Tensor, heads: range) -> FinishCopy:
        due_N = self._count_due(part.rows_N5[:, 0], part.rows_N5[:, 2])
        if not due_N.any():
            return _nothing
        part = part if due_N.all() else part.chosen(np.flatnonzero(due_N))
        copy = self._target.pull(part, pool_LB2KPH, heads, self.heads)
        if copy is None:
            self._stats.add_failures("late", len(part.rows_N5))
            return _nothing
        return partial(self._end_part, part, copy)

    def _end_part(self, part: BlockPart, copy: RunningCopy) -> None:
        is_right_N = combine_digests(self._target.end_copy(copy)) == part.digests_N
        num_verified = self._progress.note_layers(part, is_right_N)
        self._stats.add_failures("digest", len(is_right_N) - int(is_right_N.sum()))
        self._stats.add_verified(num_verified, num_verified * self._block_bytes)

    def take_missing(self) -> list[int]:
        """Return the blocks that must still arrive, in order, and count those of which nothing was received."""
        missing, num_silent = self._progress.take_missing()
        self._stats.add_failures("missing", num_silent)
        return missing

    def num_leading_verified(self) -> int:
        """How many blocks are verified without a gap, from the first."""
        return self._progress.num_leading_verified()

    def _due(self, blocks: Sequence[tuple[int, int]]) -> list[int]:
        """The places of those blocks that are still wanted and are the ones that were announced; count the others."""
        indices_N = np.array([index for index, _ in blocks], np.int64)
        num_tokens_N = np.zeros(len(blocks), np.int64)
        for at, (index, generation) in enumerate(blocks):
            header, _ = self._announced.get(index, (None, None))
            if header is not None and header.generation == generation:
                num_tokens_N[at] = header.num_tokens
        due: list[int] = np.flatnonzero(self._count_due(indices_N, num_tokens_N)).tolist()
        return due

    def _count_due(self, indices_N: Digests, num_tokens_N: Digests) -> npt.NDArray[np.bool_]:
        """Which of these blocks are still wanted, with as many tokens; count the others."""
        is_double_N, is_due_N = self._progress.judge(indices_N, num_tokens_N)
        num_double, num_due = int(is_double_N.sum()), int(is_due_N.sum())
        self._stats.add_failures("duplicate", num_double)
        self._stats.add_failures("stale", len(indices_N) - num_double - num_due)
        return is_due_N
