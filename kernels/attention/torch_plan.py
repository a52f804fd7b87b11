"""How torch attends a step's batch: decodes in groups of similar length, prompt chunks in tiles of queries.

Made once per step and window by `WindowPlanner`; used by `torch_backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionShape, Span

# R sequences of a group, K KV heads that are read, H head dim, B blocks, P tokens per block
# L keys, Q queries of a tile

# A tile's mask has at most this many rows; its keys end with its last query, so later keys cost nothing.
_TILE_QUERIES = 256
# Keys and values that a group of decodes gathers at once. On a CPU they should stay in the level-2 cache until they are
# read: 64 x 192 keys took 2.4 ms rather than 3.3 ms (EPYC, 1 thread, 2026-11). On a GPU it bounds temporary memory.
_GATHER_BYTES_CPU = 2 << 20
_GATHER_BYTES_GPU = 256 << 20


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of one new token each and of similar length, padded to the longest.

    `cache_rows` picks [2, R, K, B] runs of P tokens out of the cache; `mask_R11L` is 0 where a key is seen, else -inf.
    """

    batch_rows: slice | Tensor
    size: int
    cache_rows: Tensor
    mask_R11L: Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [first, last) of a chunk over its keys [first_key, last_key). No mask: plain causal, from key 0 on."""

    first: int
    last: int
    first_key: int
    last_key: int
    mask_QL: Tensor | None


@dataclass(frozen=True, slots=True)
class Chunk:
    batch_rows: slice
    cache_rows: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """A step's attention in layers of one window."""

    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class WindowPlanner:
    shape: AttentionShape
    window: int | None
    device: torch.device
    dtype: torch.dtype

    def plan(self, spans: Sequence[Span]) -> WindowBatch:
        single = [span for span in spans if span.length == 1]
        long = [span for span in spans if span.length > 1]
        groups = _group_by_length(single, self.shape.tokens_per_block, self.window, self._most_gathered_keys)
        masks = self._tile_masks(long)
        return WindowBatch(
            tuple(self._decode_group(group) for group in groups), tuple(self._chunk(span, masks) for span in long)
        )

    @property
    def _most_gathered_keys(self) -> int:
        limit = _GATHER_BYTES_CPU if self.device.type == "cpu" else _GATHER_BYTES_GPU
        return limit // (2 * len(self.shape.read_heads) * self.shape.head_dim * self.dtype.itemsize)

    def _runs(self, blocks: Tensor) -> Tensor:
        """[..., B] block ids -> [2, ..., K, B] rows of the cache seen as runs of P tokens."""
        K, heads = self.shape.num_kv_heads, self.shape.read_heads
        planes = torch.tensor([[*heads], [K + head for head in heads]], device=self.device)
        planes = planes.view(2, *[1] * (blocks.dim() - 1), len(heads), 1)
        return blocks.unsqueeze(-2) * (2 * K) + planes

    def _decode_group(self, spans: Sequence[Span]) -> DecodeGroup:
        P, window = self.shape.tokens_per_block, self.window
        tables, first_keys, last_keys = [], [], []
        for span in spans:
            first_key = 0 if window is None else max(0, span.stop - window)
            skipped = first_key // P
            tables.append(span.blocks[skipped : -(-span.stop // P)])
            first_keys.append(first_key - skipped * P)
            last_keys.append(span.stop - skipped * P)
        width = max(map(len, tables))
        # Filled up with blocks of its own: what another sequence has left, NaN perhaps, must not meet a weight of 0.
        table_RB = torch.tensor([[*table, *[table[0]] * (width - len(table))] for table in tables], device=self.device)
        bounds = torch.tensor([first_keys, last_keys], device=self.device).view(2, -1, 1)
        keys_L = torch.arange(width * P, device=self.device)
        hidden_RL = (keys_L < bounds[0]) | (keys_L >= bounds[1])
        mask_RL = torch.zeros(hidden_RL.shape, dtype=self.dtype, device=self.device).masked_fill_(
            hidden_RL, float("-inf")
        )
        rows = [span.first_row for span in spans]
        is_run = rows == list(range(rows[0], rows[0] + len(rows)))
        batch_rows = slice(rows[0], rows[0] + len(rows)) if is_run else torch.tensor(rows, device=self.device)
        return DecodeGroup(batch_rows, len(rows), self._runs(table_RB).flatten(), mask_RL[:, None, None, :])

    def _chunk(self, span: Span, masks: _TileMasks | None) -> Chunk:
        P, window = self.shape.tokens_per_block, self.window
        skipped = 0 if window is None else max(0, span.start - window + 1) // P
        blocks_B = torch.tensor(span.blocks[skipped : -(-span.stop // P)], device=self.device)
        start, stop = span.start - skipped * P, span.stop - skipped * P
        rows = slice(span.first_row, span.first_row + span.length)
        if start == 0 and (window is None or span.stop <= window):
            tiles: tuple[Tile, ...] = (Tile(0, span.length, 0, stop, None),)
        else:
            assert masks is not None
            tiles = tuple(
                masks.tile(first, min(first + _TILE_QUERIES, span.length), start)
                for first in range(0, span.length, _TILE_QUERIES)
            )
        return Chunk(rows, self._runs(blocks_B).flatten(), tiles)

    def _tile_masks(self, spans: Sequence[Span]) -> _TileMasks | None:
        window = self.window
        masked = [span for span in spans if span.start or (window is not None and span.stop > window)]
        if not masked:
            return None
        width = max(span.stop for span in masked)
        if window is not None:
            width = min(width, window + _TILE_QUERIES + self.shape.tokens_per_block)
        return _TileMasks(
            min(_TILE_QUERIES, max(span.length for span in masked)), width, window, self.dtype, self.device
        )


class _TileMasks:
    """Every tile's mask is a view into one band, since what a query sees depends only on its distance to the key.

    band[i, j] = 0 where j <= width + i (and j > width + i - window), else -inf
    """

    def __init__(self, rows: int, width: int, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.window = window
        distance = torch.arange(rows, device=device).unsqueeze(1) + width - torch.arange(width + rows, device=device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        self.band = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

    def tile(self, first: int, last: int, start: int) -> Tile:
        """Queries [first, last) of a chunk whose query 0 stands at key `start`."""
        position = start + first
        first_key = 0 if self.window is None else max(0, position - self.window + 1)
        shift = self.width - (position - first_key)
        mask_QL = self.band[: last - first, shift : shift + start + last - first_key]
        if mask_QL.is_cuda:  # its kernels read masks in aligned vectors; a view starts anywhere
            mask_QL = mask_QL.clone(memory_format=torch.contiguous_format)
        return Tile(first, last, first_key, start + last, mask_QL)


def _group_by_length(
    spans: Sequence[Span], tokens_per_block: int, window: int | None, most_keys: int
) -> list[list[Span]]:
    """At most `most_keys` padded keys a group; padding adds at most a third or three blocks to any."""
    keys = [span.stop if window is None else min(span.stop, window) for span in spans]
    order: Sequence[int] = range(len(spans))
    slack = 3 * tokens_per_block
    if spans and max(keys) > max(min(keys) * 4 // 3, min(keys) + slack):
        order = sorted(order, key=keys.__getitem__)
    groups: list[list[Span]] = []
    shortest = longest = 0
    for i in order:
        longest = max(longest, keys[i])
        is_full = not groups or (len(groups[-1]) + 1) * longest > most_keys
        if is_full or keys[i] > max(shortest * 4 // 3, shortest + slack):
            groups.append([])
            shortest = longest = keys[i]
        groups[-1].append(spans[i])
        shortest = min(shortest, keys[i])
    return groups
