"""Causal attention of prompt chunks over a paged KV cache: chunks with a prefix, sliding windows. Called once a layer.

Fresh prompts without a window are faster through cuDNN's scaled_dot_product_attention on the keys just computed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from tensorweave.kernels.attention.tiles import TILE_QUERIES

# T tokens, N query heads, K KV heads, G = N / K, H head dim, Z tiles of queries
# B blocks of the pool, P tokens per block, C = 2 K planes of a block, W blocks per row of the block table

# Keys per step, stages, warps. 8,192 tokens, blocks of 32, H100: 1,418 µs with (64, 3, 4), 1,518 with (32, 4, 4); with
# a window of 1,024: 685 and 466.
_TILING, _TILING_WINDOWED, _TILING_WIDE = (64, 3, 4), (32, 4, 4), (32, 1, 8)
_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["query_stride", "table_stride", "window"])
def _prefill(
    q_ptr, out_ptr, cache_ptr, table_ptr, tiles_ptr, scale, query_stride, table_stride, window,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, WINDOWED: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    row0, position0, rows, sequence = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if rows == 0:
        return
    head = tl.program_id(1)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, H)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float16 if dtype == tl.float8e4nv else dtype  # float16 has all of e4m3's numbers
    live = (m < rows)[:, None]
    token = (row0 + m).to(tl.int64)[:, None]
    q = tl.load(q_ptr + token * query_stride + head * H + d[None, :], mask=live, other=0.0).to(wide)
    row_table = table_ptr + sequence * table_stride
    planes = cache_ptr + head // (N // K) * P * H
    high = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, H), tl.float32)
    stop = position0 + rows
    split = position0 // BN * BN
    begin = tl.maximum(position0 - window + 1, 0) // BN * BN if WINDOWED else 0
    for part in tl.static_range(2):  # keys that every row may see, then those of the tile itself
        for start in tl.range(begin if part == 0 else split, split if part == 0 else stop, BN, num_stages=STAGES):
            at = start + n
            seen = at < stop
            if WINDOWED:  # blocks before the window may be gone
                seen &= at > position0 - window
            if P >= BN:
                block = tl.load(row_table + start // P).to(PLACE)
                offset = block * (2 * K * P * H) + (start % P + n) * H
            else:
                block = tl.load(row_table + at // P, mask=seen, other=0).to(PLACE)
                offset = block * (2 * K * P * H) + at % P * H
            key_ptr = planes + offset[:, None] + d[None, :]
            if part == 0 and not WINDOWED:
                keys = tl.load(key_ptr)
                values = tl.load(key_ptr + K * P * H)
            else:
                keys = tl.load(key_ptr, mask=seen[:, None], other=0.0)
                values = tl.load(key_ptr + K * P * H, mask=seen[:, None], other=0.0)
            scores = tl.dot(q, keys.to(wide).T, input_precision="ieee") * scale
            distance = (position0 + m)[:, None] - at[None, :]
            if part == 1:
                scores = tl.where(distance >= 0, scores, float("-inf"))
            if WINDOWED:
                scores = tl.where(distance < window, scores, float("-inf"))
            higher = tl.maximum(high, tl.max(scores, 1))
            shrink = tl.exp2(high - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(wide), values.to(wide), acc * shrink[:, None], input_precision="ieee")
            high = higher
    out = out_ptr + (token * N + head) * H + d[None, :]
    tl.store(out, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty), mask=live)


def prefill_attention(
    q_TNH: Tensor,
    cache_BCPH: Tensor,
    table_RW: Tensor,
    tiles_Z4: Tensor,
    out_TNH: Tensor,
    *,
    scale: float,
    window: int | None = None,
    tiling: tuple[int, int, int] | None = None,
) -> None:
    """out = softmax(q keysᵀ · scale) values of chunks whose keys and values are in the cache already.

    TFLOP/s with 32 + 8 heads of 128 (H100, 2026-11-26), blocks of 32 / 64 tokens: 4 x 2,048 tokens 310 / 349, 8,192
    388 / 424, 2,048 after 6,144 383 / 430; cuDNN, which cannot read a paged prefix: 524 at 4 x 2,048.

    Args:
        q_TNH: rotated queries; rows may have a stride (a view of the projection's output).
        cache_BCPH: one layer's blocks, contiguous.
        table_RW: int32, block ids of each sequence.
        tiles_Z4: int32 on the device, from `tile_queries`. Rows in no tile are not written.
        window: the newest keys that a query sees, itself included; None: all.
        tiling: keys per step, stages, warps; None: what was measured best.
    """
    _, N, H = q_TNH.shape
    _, C, P, _ = cache_BCPH.shape
    assert H & (H - 1) == 0, "head_dim must be a power of two"
    assert P & (P - 1) == 0, "tokens per block must be a power of two"
    assert cache_BCPH.is_contiguous()
    assert out_TNH.is_contiguous()
    assert q_TNH.stride()[1:] == (H, 1)
    if not len(tiles_Z4):
        return
    if tiling is None:
        tiling = _TILING_WIDE if cache_BCPH.element_size() == 4 else _TILING if window is None else _TILING_WINDOWED
    BN, stages, warps = tiling
    _prefill[(len(tiles_Z4), N)](
        q_TNH, out_TNH, cache_BCPH, table_RW, tiles_Z4, scale * _LOG2_E, q_TNH.stride(0), table_RW.stride(0),
        2**30 if window is None else window,
        N=N, K=C // 2, H=H, P=P, BM=TILE_QUERIES, BN=BN, STAGES=stages,
        WINDOWED=window is not None, PLACE=tl.int32 if cache_BCPH.numel() < 2**31 else tl.int64, num_warps=warps,
    )  # fmt: skip
