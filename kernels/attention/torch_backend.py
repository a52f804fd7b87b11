"""Attention over a paged KV cache: a step's keys and values go into their blocks, every query reads its own sequence.

One contract for prompt chunks and decodes: keys are written first, attention reads only the cache. `AttentionPlan`
holds what depends on the batch alone; it is made once a step for each distinct window, and every layer reads it.
On a CPU the native kernel reads the cache in place; this is also the plain-torch path, for where there is none.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.heads.reference import WriteSlots
from tensorweave.kernels.native.library import NativeKernels, load_native

# T tokens of the batch, R sequences of a group, N query heads, K KV heads, G query heads a KV head, H head dim
# B blocks, P tokens a block, L keys, Q queries of a tile
# C = 2 K planes of a block: its K key heads, then its K value heads

# A tile's mask has at most this many rows; its keys end with its last query, so later keys cost nothing.
_TILE_QUERIES = 256
# Keys and values that a group of decodes gathers at once. On a CPU they should stay in the level-2 cache until they are
# read: 64 x 192 keys took 2.4 ms rather than 3.3 ms (EPYC, 1 thread, 2026-11). On a GPU it bounds temporary memory.
_GATHER_BYTES_CPU = 2 << 20
_GATHER_BYTES_GPU = 256 << 20
# The native kernel takes the keys of a sequence in runs of this many, from its first position on (RUN in its source),
# and a prompt's queries in tiles, which share what they read.
_NATIVE_RUN = 256
_NATIVE_TILE = 48


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first_row, first_row + length) of the batch: tokens [start, start + length) of the sequence in `blocks`."""

    first_row: int
    length: int
    start: int
    blocks: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences of one new token each and of similar length, padded to the longest.

    `cache_rows` picks [2, R, K, B] runs of P tokens out of the cache; `mask_R11L` is 0 where a key is seen, else -inf.
    """

    batch_rows: slice | Tensor
    size: int
    cache_rows: Tensor
    mask_R11L: Tensor


@dataclass(frozen=True, slots=True)
class _NativePlan:
    """All of a step's attention for the native kernel.

    `tiles` has five numbers a tile of queries (`query_tile` in attention.h), `blocks` the block tables, end to end.
    """

    native: NativeKernels
    tiles: Tensor
    blocks: Tensor
    read_heads: Tensor
    num_tasks: int
    window: int


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries [first, last) of a chunk over its keys [first_key, last_key). No mask: plain causal, from key 0 on."""

    first: int
    last: int
    first_key: int
    last_key: int
    mask_QL: Tensor | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    batch_rows: slice
    cache_rows: Tensor
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Everything about a step's attention that no layer changes. Where there is a native plan, it is all."""

    num_read_heads: int
    native: _NativePlan | None
    decodes: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans for one shape of cache.

    Args:
        num_kv_heads: KV heads of a block, K.
        read_heads: the KV head read by each run of query heads; longer than K where query heads do not divide evenly.
    """

    num_kv_heads: int
    read_heads: tuple[int, ...]
    tokens_per_block: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    def write_slots(self, slots_T: Tensor) -> WriteSlots:
        """For token slots, block * P + offset."""
        P, C = self.tokens_per_block, 2 * self.num_kv_heads
        first_T1 = (slots_T // P * (C * P) + slots_T % P).unsqueeze(1)
        return WriteSlots(slots_T, (first_T1 + torch.arange(0, C * P, P, device=self.device)).flatten())

    def plan(self, spans: Sequence[Span], window: int | None) -> AttentionPlan:
        """`window`: positions each query looks back, itself included; None: all."""
        native = self._native_plan(spans, window)
        if native is not None:
            return AttentionPlan(len(self.read_heads), native, (), ())
        single = [span for span in spans if span.length == 1]
        long = [span for span in spans if span.length > 1]
        groups = _group_by_length(single, self.tokens_per_block, window, self._most_gathered_keys)
        masks = self._tile_masks(long, window)
        return AttentionPlan(
            len(self.read_heads),
            None,
            tuple(self._decode_group(group, window) for group in groups),
            tuple(self._chunk(span, window, masks) for span in long),
        )

    def _native_plan(self, spans: Sequence[Span], window: int | None) -> _NativePlan | None:
        native = load_native(self.dtype) if self.device.type == "cpu" else None
        if native is None or self.head_dim % native.vector_length or not spans:
            return None
        tiles, blocks, num_tasks, R = array("q"), array("i"), 0, len(self.read_heads)
        for span in spans:
            first_block = len(blocks)
            blocks.extend(span.blocks)
            # Late queries see most keys: threads that take tiles in order should end with small ones.
            for first in reversed(range(0, span.length, _NATIVE_TILE)):
                size, start = min(_NATIVE_TILE, span.length - first), span.start + first
                tiles.extend((span.first_row + first, size, start, first_block, num_tasks))
                first_key = 0 if window is None else max(0, start + 1 - window)
                num_tasks += R if size > 1 else R * (start // _NATIVE_RUN - first_key // _NATIVE_RUN + 1)
        return _NativePlan(
            native,
            torch.frombuffer(tiles, dtype=torch.int64),
            torch.frombuffer(blocks, dtype=torch.int32),
            torch.tensor(self.read_heads, dtype=torch.int64),
            num_tasks,
            window or 0,
        )

    @property
    def _most_gathered_keys(self) -> int:
        limit = _GATHER_BYTES_CPU if self.device.type == "cpu" else _GATHER_BYTES_GPU
        return limit // (2 * len(self.read_heads) * self.head_dim * self.dtype.itemsize)

    def _runs(self, blocks: Tensor) -> Tensor:
        """[..., B] block ids -> [2, ..., K, B] rows of the cache seen as runs of P tokens."""
        K = self.num_kv_heads
        planes = torch.tensor([[*self.read_heads], [K + head for head in self.read_heads]], device=self.device)
        planes = planes.view(2, *[1] * (blocks.dim() - 1), len(self.read_heads), 1)
        return blocks.unsqueeze(-2) * (2 * K) + planes

    def _decode_group(self, spans: Sequence[Span], window: int | None) -> _DecodeGroup:
        P = self.tokens_per_block
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
        return _DecodeGroup(batch_rows, len(rows), self._runs(table_RB).flatten(), mask_RL[:, None, None, :])

    def _chunk(self, span: Span, window: int | None, masks: _TileMasks | None) -> _Chunk:
        P = self.tokens_per_block
        skipped = 0 if window is None else max(0, span.start - window + 1) // P
        blocks_B = torch.tensor(span.blocks[skipped : -(-span.stop // P)], device=self.device)
        start, stop = span.start - skipped * P, span.stop - skipped * P
        rows = slice(span.first_row, span.first_row + span.length)
        if start == 0 and (window is None or span.stop <= window):
            tiles: tuple[_Tile, ...] = (_Tile(0, span.length, 0, stop, None),)
        else:
            assert masks is not None
            tiles = tuple(
                masks.tile(first, min(first + _TILE_QUERIES, span.length), start)
                for first in range(0, span.length, _TILE_QUERIES)
            )
        return _Chunk(rows, self._runs(blocks_B).flatten(), tiles)

    def _tile_masks(self, spans: Sequence[Span], window: int | None) -> _TileMasks | None:
        masked = [span for span in spans if span.start or (window is not None and span.stop > window)]
        if not masked:
            return None
        width = max(span.stop for span in masked)
        if window is not None:
            width = min(width, window + _TILE_QUERIES + self.tokens_per_block)
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

    def tile(self, first: int, last: int, start: int) -> _Tile:
        """Queries [first, last) of a chunk whose query 0 stands at key `start`."""
        position = start + first
        first_key = 0 if self.window is None else max(0, position - self.window + 1)
        shift = self.width - (position - first_key)
        mask_QL = self.band[: last - first, shift : shift + start + last - first_key]
        if mask_QL.is_cuda:  # its kernels read masks in aligned vectors; a view starts anywhere
            mask_QL = mask_QL.clone(memory_format=torch.contiguous_format)
        return _Tile(first, last, first_key, start + last, mask_QL)


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


def paged_attention(q_TNH: Tensor, cache_BCPH: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v for every query over its own sequence, causal, in the plan's window: [T, N, H].

    The keys and values of the queries' own tokens must be in the cache already.
    """
    T, N, H = q_TNH.shape
    K, P = plan.num_read_heads, cache_BCPH.shape[2]
    q_TKGH = q_TNH.view(T, K, N // K, H)
    out_TKGH = torch.empty(T, K, N // K, H, dtype=q_TNH.dtype, device=q_TNH.device)
    if plan.native is not None:
        _attend_natively(q_TKGH, cache_BCPH, plan.native, scale, out_TKGH)
        return out_TKGH.view(T, N, H)
    runs = cache_BCPH.view(-1, P * H)
    for group in plan.decodes:
        k_RKLH, v_RKLH = runs.index_select(0, group.cache_rows).view(2, group.size, K, -1, H)
        out_TKGH[group.batch_rows] = _attend_decodes(q_TKGH[group.batch_rows], k_RKLH, v_RKLH, group.mask_R11L, scale)
    for chunk in plan.chunks:
        k_KLH, v_KLH = runs.index_select(0, chunk.cache_rows).view(2, K, -1, H)
        _attend_chunk(q_TKGH[chunk.batch_rows], k_KLH, v_KLH, chunk.tiles, scale, out_TKGH[chunk.batch_rows])
    return out_TKGH.view(T, N, H)


def _attend_natively(q_TKGH: Tensor, cache_BCPH: Tensor, plan: _NativePlan, scale: float, out_TKGH: Tensor) -> None:
    _, K, G, H = q_TKGH.shape
    _, C, P, _ = cache_BCPH.shape
    partial = torch.empty(plan.num_tasks * G * (H + 2), dtype=torch.float32)
    plan.native.attend(
        q_TKGH.data_ptr(),
        q_TKGH.stride(0),
        cache_BCPH.data_ptr(),
        plan.tiles.data_ptr(),
        plan.blocks.data_ptr(),
        plan.read_heads.data_ptr(),
        partial.data_ptr(),
        out_TKGH.data_ptr(),
        *(len(plan.tiles) // 5, plan.num_tasks, plan.window, K, G, C // 2, P, H),
        scale,
    )


def _attend_decodes(q_RKGH: Tensor, k_RKLH: Tensor, v_RKLH: Tensor, mask_R11L: Tensor, scale: float) -> Tensor:
    """Batched products: 132 µs, the fused op 321 µs (bfloat16, R 16, K 3, L 192, EPYC, 1 thread, 2026-11)."""
    R, K, G, H = q_RKGH.shape
    L = k_RKLH.shape[2]
    scores = torch.bmm((q_RKGH * scale).view(R * K, G, H), k_RKLH.view(R * K, L, H).transpose(1, 2)).float()
    weights = torch.softmax(scores.view(R, K, G, L).add_(mask_R11L), dim=-1).to(v_RKLH.dtype)
    return torch.bmm(weights.view(R * K, G, L), v_RKLH.view(R * K, L, H)).view(R, K, G, H)


def _attend_chunk(
    q_TKGH: Tensor, k_KLH: Tensor, v_KLH: Tensor, tiles: Sequence[_Tile], scale: float, out_TKGH: Tensor
) -> None:
    """Query heads of a group stand in the batch dimension, over which keys and values are broadcast without a copy."""
    G = q_TKGH.shape[2]
    q_GKTH, out_GKTH = q_TKGH.permute(2, 1, 0, 3), out_TKGH.permute(2, 1, 0, 3)
    for tile in tiles:
        keys = slice(tile.first_key, tile.last_key)
        k_GKLH, v_GKLH = k_KLH[:, keys].expand(G, -1, -1, -1), v_KLH[:, keys].expand(G, -1, -1, -1)
        out_GKTH[:, :, tile.first : tile.last] = F.scaled_dot_product_attention(
            q_GKTH[:, :, tile.first : tile.last],
            k_GKLH,
            v_GKLH,
            tile.mask_QL,
            is_causal=tile.mask_QL is None,
            scale=scale,
        )


def paged_attention_reference(
    q_TNH: Tensor,
    cache_BCPH: Tensor,
    spans: Sequence[Span],
    kv_of_query: Sequence[int],
    window: int | None,
    scale: float,
) -> Tensor:
    """The same, query by query and head by head in float32: the oracle of the tests."""
    K, P = cache_BCPH.shape[1] // 2, cache_BCPH.shape[2]
    out_TNH = torch.empty_like(q_TNH)
    for span in spans:
        for offset in range(span.length):
            last = span.start + offset
            first = 0 if window is None else max(0, last - window + 1)
            slots = [(span.blocks[i // P], i % P) for i in range(first, last + 1)]
            for head, kv_head in enumerate(kv_of_query):
                k_LH = torch.stack([cache_BCPH[block, kv_head, i] for block, i in slots]).float()
                v_LH = torch.stack([cache_BCPH[block, K + kv_head, i] for block, i in slots]).float()
                weights_L = torch.softmax(k_LH @ q_TNH[span.first_row + offset, head].float() * scale, dim=0)
                out_TNH[span.first_row + offset, head] = (weights_L @ v_LH).to(out_TNH.dtype)
    return out_TNH
