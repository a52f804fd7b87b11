"""Attention of one new token per sequence over a paged KV cache. Called once a layer of a decode step, in CUDA graphs.

The grid depends on the number of rows alone; lengths and block tables are read on the device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.linear.triton_quantize import PEAKS_PER_ROW, raise_peaks

__all__ = ["DecodeWorkspace", "HeadRotation", "choose_splits", "decode_attention"]

# R rows (sequences), N query heads, K KV heads, G = N / K query heads per KV head, X = N + 2 K, H head dim
# B blocks of the pool, P tokens per block, C = 2 K planes of a block, W blocks per row of the block table, S splits
# L positions; sequences have rows of the block table of their own, by slot

_MIN_ROWS = 16  # of the matrix unit: G query heads are padded to this many
_PREFETCH_ROWS = 8  # to this batch, a program's first keys are fetched into the level-2 cache before the wait
_SAME_BITS_ROWS = 16
_LOG2_E = math.log2(math.e)


@triton.jit
def _rotated(heads_ptr, other_ptr, mask, cos, sin, norm_ptr, d, other, epsilon, H: tl.constexpr, NORM: tl.constexpr):
    """Heads [rows, H] after norm and rotation, float32. `sin` is negative in the first half."""
    x = tl.load(heads_ptr, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(other_ptr, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / H + epsilon)[:, None]
        x = x * factor * tl.load(norm_ptr + d).to(tl.float32)[None, :]
        y = y * factor * tl.load(norm_ptr + other).to(tl.float32)[None, :]
    return x * cos[None, :] + y * sin[None, :]


@triton.jit
def _prefetch_l2(ptr):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _merge(
    acc, high, total, out, parts_ptr, stats_ptr, arrived_ptr, peaks_ptr, row, head, split, K: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, S: tl.constexpr, PEAKS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Leave this program's part for the last program of the row and head to arrive, which adds them all."""
    d = tl.arange(0, H)
    g = tl.arange(0, GP)
    live = (g < G)[:, None]
    first_part = (row * K + head) * S
    mine = (first_part + split) * G + g
    tl.store(parts_ptr + mine[:, None] * H + d[None, :], acc, mask=live)
    tl.store(stats_ptr + mine * 2, high, mask=g < G)
    tl.store(stats_ptr + mine * 2 + 1, total, mask=g < G)
    tl.debug_barrier()  # all threads' parts are written before this program is counted
    if tl.atomic_add(arrived_ptr + row * K + head, 1, sem="acq_rel") == S - 1:
        tl.store(arrived_ptr + row * K + head, 0)
        z = tl.arange(0, S)
        peak = 0.0
        for i in tl.static_range(G):  # .cg: parts of other multiprocessors, which the level-1 cache does not know
            part = (first_part + z) * G + i
            tops = tl.load(stats_ptr + part * 2, cache_modifier=".cg")
            factor = tl.exp2(tops - tl.max(tops, 0))
            sums = tl.sum(tl.load(stats_ptr + part * 2 + 1, cache_modifier=".cg") * factor, 0)
            each = tl.load(parts_ptr + part[:, None] * H + d[None, :], cache_modifier=".cg")
            merged = (tl.sum(each * factor[:, None], 0) / tl.where(sums > 0, sums, 1.0)).to(out.dtype.element_ty)
            tl.store(out + i * H + d, merged)
            peak = tl.maximum(peak, tl.max(tl.abs(merged.to(tl.float32)), 0))
        if PEAKS:
            raise_peaks(peaks_ptr, row * A + head % A, peak, None)


@triton.jit(
    do_not_specialize=["row_stride", "table_stride", "window"],
    do_not_specialize_on_alignment=["slots_ptr", "lengths_ptr"],  # they may begin anywhere in a buffer
)
def _decode(
    heads_ptr, out_ptr, cache_ptr, table_ptr, slots_ptr, lengths_ptr, rope_ptr, query_norm_ptr, key_norm_ptr,
    parts_ptr, stats_ptr, arrived_ptr, peaks_ptr, scale, epsilon, row_stride, table_stride, window,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, S: tl.constexpr, FUSED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
    PREFETCH: tl.constexpr, PEAKS: tl.constexpr, A: tl.constexpr, PLACE: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, H)
    g = tl.arange(0, GP)
    n = tl.arange(0, BN)
    live = (g < G)[:, None]
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    FP8: tl.constexpr = dtype == tl.float8e4nv
    wide: tl.constexpr = (
        tl.float16 if FP8 else dtype
    )  # float16 has all of e4m3's numbers, and converts at twice the rate
    # Nothing up to the wait is written by the kernel before; .cg, because the level-1 cache may hold the last step's.
    length = tl.load(lengths_ptr + row, cache_modifier=".cg")
    first = tl.maximum(length - window, 0)
    base = first // BN * BN
    per = tl.cdiv(tl.cdiv(length - base, S), BN) * BN
    begin = base + split * per
    end = tl.minimum(length - 1 if FUSED else length, begin + per)
    if BY_SLOT:
        row_table = table_ptr + tl.load(slots_ptr + row, cache_modifier=".cg") * table_stride
    else:
        row_table = table_ptr + row * table_stride
    if FUSED:
        last = tl.maximum(length - 1, 0)
        other = (d + H // 2) % H
        cos = tl.load(rope_ptr + last.to(tl.int64) * H + d % (H // 2))
        sin = tl.load(rope_ptr + last.to(tl.int64) * H + H // 2 + d % (H // 2))
        sin = tl.where(d < H // 2, -sin, sin)
    if PREFETCH and begin < end:
        at = tl.minimum(tl.maximum(begin + n, first), end - 1)
        block = tl.load(row_table + at // P, cache_modifier=".cg").to(PLACE)
        LINE: tl.constexpr = 128 if FP8 else 64  # elements of 128 bytes
        line = (
            cache_ptr
            + (((block * (2 * K) + head) * P + at % P) * H)[:, None]
            + tl.arange(0, (H + LINE - 1) // LINE)[None, :] * LINE
        )
        _prefetch_l2(line)
        _prefetch_l2(line + K * P * H)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    heads = heads_ptr + row.to(tl.int64) * row_stride
    query = heads + (head * G + g)[:, None] * H
    high = tl.full((GP,), -1e30, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, H), tl.float32)
    if FUSED:
        q = _rotated(
            query + d[None, :], query + other[None, :], live, cos, sin, query_norm_ptr, d, other, epsilon, H, NORM
        ).to(wide)
        if (last >= begin) & (
            last < begin + per
        ):  # this program has the new token: out of registers, and into the cache
            key_ptr = heads + (K * G + head) * H + tl.zeros((1, 1), tl.int32)
            key = _rotated(
                key_ptr + d[None, :], key_ptr + other[None, :], tl.full((1, 1), True, tl.int1), cos, sin,
                key_norm_ptr, d, other, epsilon, H, NORM,
            ).to(dtype)  # fmt: skip
            value = tl.load(heads + (K * G + K + head) * H + d[None, :]).to(dtype)
            slot = (tl.load(row_table + last // P).to(tl.int64) * (2 * K) + head) * P + last % P
            tl.store(cache_ptr + slot * H + d[None, :], key)
            tl.store(cache_ptr + (slot + K * P) * H + d[None, :], value)
            high = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
            total = tl.full((GP,), 1.0, tl.float32)
            acc += value.to(tl.float32)
    else:
        q = tl.load(query + d[None, :], mask=live, other=0.0).to(wide)
    for start in tl.range(begin, end, BN, num_stages=STAGES):
        at = start + n
        seen = (at >= first) & (at < end)
        if P >= BN:
            block = tl.load(row_table + start // P).to(PLACE)
            slot = (block * (2 * K) + head) * P + start % P + n
        else:
            block = tl.load(row_table + at // P, mask=seen, other=0).to(PLACE)
            slot = (block * (2 * K) + head) * P + at % P
        key_ptr = cache_ptr + slot[:, None] * H + d[None, :]
        keys = tl.load(key_ptr, mask=seen[:, None], other=0.0, eviction_policy="evict_first")
        values = tl.load(key_ptr + K * P * H, mask=seen[:, None], other=0.0, eviction_policy="evict_first")
        scores = tl.dot(q, keys.to(wide).T, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp2(high - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(wide), values.to(wide), acc * shrink[:, None], input_precision="ieee")
        high = higher
    out = out_ptr + (row.to(tl.int64) * K + head) * G * H
    if S == 1:
        result = (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out + g[:, None] * H + d[None, :], result, mask=live)
        if PEAKS:
            peak = tl.max(tl.max(tl.where(live, tl.abs(result.to(tl.float32)), 0.0), 1), 0)
            raise_peaks(peaks_ptr, row * A + head % A, peak, None)
    else:
        _merge(
            acc, high, total, out, parts_ptr, stats_ptr, arrived_ptr, peaks_ptr, row, head, split, K, G, GP, H, S,
            PEAKS, A,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """What the splits of one launch leave each other. Launches in stream order may share it; the counters stay zero."""

    parts: Tensor
    stats: Tensor
    arrived: Tensor

    @classmethod
    def create(
        cls, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, max_splits: int, device: torch.device
    ) -> DecodeWorkspace:
        count = max_rows * num_heads * max_splits
        return cls(
            torch.empty(count * head_dim, dtype=torch.float32, device=device),
            torch.empty(count * 2, dtype=torch.float32, device=device),
            torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
        )


def choose_splits(num_rows: int, num_kv_heads: int, max_length: int, total_length: int | None = None) -> int:
    """A power of two, at most 32, with 64 keys or more each. How many programs are best, inside a step on an H100: 512
    for 1 row, 256 for 17 to 47, 1,024 from 48 on; and so many that one row does not outlast the others: a program takes
    27 ns per key, the card 1.4 (8 KV heads of 128). For 2 to 16 rows the number does not depend on the rows, so that a
    row has the same bits in any such batch; 64 programs a row are the best at 8 rows, and within 1 % at 16."""
    if 1 < num_rows <= _SAME_BITS_ROWS:
        even = max(1, 64 // num_kv_heads)
    else:
        programs = 512 if num_rows == 1 else 256 if num_rows < 48 else 1024
        even = max(1, programs // (num_rows * num_kv_heads))
    uneven = 0 if total_length is None else -(-20 * max_length // total_length)
    wanted = min(max(even, uneven), max(1, max_length // 64), 32)
    return 1 << (wanted.bit_length() - 1)


def decode_attention(
    heads_RXH: Tensor,
    cache_BCPH: Tensor,
    table_RW: Tensor,
    lengths_R: Tensor,
    out_RNH: Tensor,
    workspace: DecodeWorkspace,
    *,
    scale: float,
    num_splits: int,
    rotation: HeadRotation | None = None,
    window: int | None = None,
    slots_R: Tensor | None = None,
    peaks_RA: Tensor | None = None,
    tiling: tuple[int, int, int] | None = None,
    pdl: bool = False,
) -> None:
    """out = softmax(q keysᵀ · scale) values for the newest token of each row.

    With 32 + 8 heads of 128 and blocks of 32, rotation included (H100, 2026-11-26; reads at 3.2 TB/s): 1 x 1,024 keys
    6.9 µs, 8 x 1,024 18.6, 64 x 1,024 97 (2.76 TB/s), 256 x 200 82, 300 x 1,500 609 (3.02), 32 x 8,192 362 (2.97).

    With a `rotation`, heads are the projection's [R, N + 2 K, H] (queries, keys, values): queries and the new key are
    normed and rotated here, the new key and value are stored in the cache, and no other kernel is needed. Without one,
    heads are rotated queries [R, N, H], and the cache holds the new key and value already.

    Args:
        cache_BCPH: one layer's blocks, contiguous; keys of all KV heads, then values. Slots past a length are not read.
            In e4m3, keys and values beyond 448 become 448, and products are made in float16.
        table_RW: int32, block ids.
        lengths_R: int32, keys of each row, the new one included. 0: a padded row, which writes zeros and no key.
        num_splits: a power of two, see `choose_splits`. The same number gives the same bits in any batch.
        window: the newest keys that are seen; None: all.
        slots_R: int32, the row of the block table of each row; None: the same.
        peaks_RA: raised to the peaks of out's rows [N * H], for a product by a `QuantizedWeight` (`triton_quantize`).
        tiling: keys per step, stages, warps; None: (64, 2, 2), within 3 % of the best at each
            even batch; with one row much longer than the others, (128, 2, 4) is up to 1.6 times faster.
        pdl: launch while the kernel before still runs (Hopper). That kernel must not write lengths, slots, table, or
            other tokens' keys: they are read before it is over.
    """
    R, N, H = out_RNH.shape
    _, C, P, _ = cache_BCPH.shape
    K = C // 2
    BN, stages, warps = tiling or (64, 2, 2)
    assert N % K == 0
    assert H & (H - 1) == 0, "head_dim must be a power of two"
    assert P & (P - 1) == 0, "tokens per block must be a power of two"
    assert cache_BCPH.is_contiguous()
    assert out_RNH.is_contiguous()
    assert workspace.parts.numel() >= R * N * num_splits * H or num_splits == 1
    norms = (None, None) if rotation is None else (rotation.query_norm_H, rotation.key_norm_H)
    rope_LH, epsilon = (None, 0.0) if rotation is None else (rotation.table_LH, rotation.epsilon)
    _decode[(K, num_splits, R)](
        heads_RXH, out_RNH, cache_BCPH, table_RW, slots_R, lengths_R, rope_LH, *norms,
        workspace.parts, workspace.stats, workspace.arrived, peaks_RA, scale * _LOG2_E, epsilon,
        heads_RXH.stride(0), table_RW.stride(0), 2**30 if window is None else window,
        K=K, G=N // K, GP=max(_MIN_ROWS, triton.next_power_of_2(N // K)), H=H, P=P, BN=BN, STAGES=stages, S=num_splits,
        FUSED=rotation is not None, NORM=norms[0] is not None, PDL=pdl, PREFETCH=pdl and R <= _PREFETCH_ROWS,
        PEAKS=peaks_RA is not None, A=PEAKS_PER_ROW, PLACE=tl.int32 if cache_BCPH.numel() < 2**31 else tl.int64,
        BY_SLOT=slots_R is not None, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
