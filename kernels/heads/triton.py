"""Norm and rotation of query and key heads, and new keys and values into the paged cache, in one kernel. Called once a
layer where `decode_attention` does not do it: prompt chunks and mixed steps."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# T tokens, N query heads, K KV heads, X = N + 2 K, H head dim, L positions
# B blocks, P tokens per block, C = 2 K planes of a block

_HEADS_PER_PROGRAM = 16


@triton.jit(
    do_not_specialize=["token_stride"],
    do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"],  # they may begin anywhere in a buffer
)
def _rope_store(
    heads_ptr, cache_ptr, slots_ptr, positions_ptr, rope_ptr, query_norm_ptr, key_norm_ptr, epsilon, token_stride,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, XB: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * XB + tl.arange(0, XB)
    i = tl.arange(0, H // 2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    cos = tl.load(rope_ptr + position * H + i)[None, :]
    sin = tl.load(rope_ptr + position * H + H // 2 + i)[None, :]
    is_head = (head < N + 2 * K)[:, None]
    is_value = (head >= N + K)[:, None]
    left_ptr = heads_ptr + token * token_stride + head[:, None] * H + i[None, :]
    raw_left = tl.load(left_ptr, mask=is_head, other=0.0)  # one thread has both numbers of a pair: in place is safe
    raw_right = tl.load(left_ptr + H // 2, mask=is_head, other=0.0)
    left = raw_left.to(tl.float32)
    right = raw_right.to(tl.float32)
    if NORM:
        factor = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / H + epsilon)[:, None]
        is_query = (head < N)[:, None]
        left_gain = tl.where(is_query, tl.load(query_norm_ptr + i)[None, :], tl.load(key_norm_ptr + i)[None, :])
        right_gain = tl.where(
            is_query, tl.load(query_norm_ptr + H // 2 + i)[None, :], tl.load(key_norm_ptr + H // 2 + i)[None, :]
        )
        left *= factor * left_gain.to(tl.float32)
        right *= factor * right_gain.to(tl.float32)
    new_left = tl.where(is_value, raw_left, (left * cos - right * sin).to(raw_left.dtype))
    new_right = tl.where(is_value, raw_right, (right * cos + left * sin).to(raw_right.dtype))
    tl.store(left_ptr, new_left, mask=is_head & (is_value == 0))
    tl.store(left_ptr + H // 2, new_right, mask=is_head & (is_value == 0))
    is_stored = is_head & (head >= N)[:, None] & (slot >= 0)
    plane = slot // P * (2 * K) + head[:, None] - N
    cache = cache_ptr + (plane * P + slot % P) * H + i[None, :]
    tl.store(cache, new_left.to(cache_ptr.dtype.element_ty), mask=is_stored)
    tl.store(cache + H // 2, new_right.to(cache_ptr.dtype.element_ty), mask=is_stored)


def rope_store(
    heads_TXH: Tensor,
    cache_BCPH: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    rope_LH: Tensor,
    *,
    query_norm_H: Tensor | None = None,
    key_norm_H: Tensor | None = None,
    epsilon: float = 0.0,
    pdl: bool = False,
) -> None:
    """Norm (if weights are given) and rotate queries and keys in place; store keys and values in the cache.

    Args:
        heads_TXH: the projection's output: N query heads, K keys, K values; rows may have a stride.
        cache_BCPH: one layer's blocks, contiguous.
        slots_T: int32 or int64, block * P + offset of each token; -1: a padded row, which is not stored.
        positions_T: int32 or int64 places in the sequence.
        rope_LH: float32, a row per position: cosines of the H/2 angles, then their sines.

    8,192 tokens of 32 + 16 heads of 128: 85 µs, 2.56 TB/s (H100, 2026-11-26).
    """
    T, X, H = heads_TXH.shape
    _, C, P, _ = cache_BCPH.shape
    K = C // 2
    assert H & (H - 1) == 0, "head_dim must be a power of two"
    assert cache_BCPH.is_contiguous()
    assert heads_TXH.stride()[1:] == (H, 1)
    assert (query_norm_H is None) == (key_norm_H is None)
    if not T:
        return
    XB = min(_HEADS_PER_PROGRAM, triton.next_power_of_2(X))
    _rope_store[(T, triton.cdiv(X, XB))](
        heads_TXH, cache_BCPH, slots_T, positions_T, rope_LH, query_norm_H, key_norm_H, epsilon, heads_TXH.stride(0),
        N=X - C, K=K, H=H, P=P, XB=XB, NORM=query_norm_H is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
