"""Low-rank updates on a GPU, for any mix of adapters in a batch: `kernels.lora.stack.add_updates` in two kernels.

Grids depend on shapes alone, so that a step can be captured in a CUDA graph whichever adapters its rows have. `shrink`
computes A x, a part of the inputs a program; `expand` sums the parts in their order and adds B A x. Programs whose rows
have no adapter, or not theirs, read nothing else.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensorweave.kernels.lora.stack import SiteStack

# T tokens, K inputs and N outputs of the product, P parts of its outputs, L places for adapters, R most rank
# S parts of the inputs; blocks of BM tokens, BN outputs, BK inputs

_BLOCK_N: Final = 64
_BLOCK_K: Final = 128
_SPLITS: Final = 8
_FEW_ROWS: Final = 16
_ROWS: Final = 64


@triton.jit(do_not_specialize=["T"])
def _shrink(
    x_ptr, a_ptr, places_ptr, ranks_ptr, low_ptr, T,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """low[s, t, p, :] of the rows that have this program's adapter."""
    split = tl.program_id(0) % S
    place = tl.program_id(0) // S % L
    part = tl.program_id(0) // (S * L)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    r = tl.arange(0, R)
    k = tl.arange(0, BK)
    per: tl.constexpr = (K + S * BK - 1) // (S * BK) * BK
    begin = split * per
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    is_mine = tl.load(places_ptr + m, mask=m < T, other=-1) == place
    if tl.sum(is_mine.to(tl.int32), 0) > 0:
        rank = tl.load(ranks_ptr + place)
        rows = x_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        a_row = a_ptr + ((part * L + place).to(tl.int64) * R + r)[:, None] * K + k[None, :]
        acc = tl.zeros((BM, R), tl.float32)
        for start in range(begin, tl.minimum(begin + per, K), BK):
            in_k = (start + k < K)[None, :]
            x = tl.load(rows + start, mask=is_mine[:, None] & in_k, other=0.0)
            a = tl.load(a_row + start, mask=(r < rank)[:, None] & in_k, other=0.0)
            acc = tl.dot(x, a.T, acc, input_precision="ieee")
        at = ((split * T + m).to(tl.int64) * P + part)[:, None] * R + r[None, :]
        tl.store(low_ptr + at, acc, mask=is_mine[:, None])


@triton.jit
def _sum_of_splits(low_ptr, m, is_mine, part: tl.constexpr, T, P: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """[R, tokens]."""
    at = (m.to(tl.int64) * P + part)[None, :] * R + tl.arange(0, R)[:, None]
    low = tl.load(low_ptr + at, mask=is_mine[None, :], other=0.0)
    for split in tl.static_range(1, S):  # always in this order: equal bits
        low += tl.load(low_ptr + split * T.to(tl.int64) * P * R + at, mask=is_mine[None, :], other=0.0)
    return low


@triton.jit(do_not_specialize=["T"])
def _expand(
    low_ptr, b_ptr, places_ptr, ranks_ptr, out_ptr, T,
    N: tl.constexpr, P: tl.constexpr, L: tl.constexpr, R: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND: where the second and third part of the outputs begin."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    r = tl.arange(0, R)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    places = tl.load(places_ptr + m, mask=m < T, other=-1)
    part_of = n % P if INTERLEAVED else (n >= FIRST).to(tl.int32) + (n >= SECOND).to(tl.int32)
    if tl.max(places, 0) >= 0:
        acc = tl.zeros((BN, BM), tl.float32)
        for place in range(L):
            is_mine = places == place
            if tl.sum(is_mine.to(tl.int32), 0) > 0:
                rank = tl.load(ranks_ptr + place)
                b_at = b_ptr + (n.to(tl.int64)[:, None] * L + place) * R + r[None, :]
                b = tl.load(b_at, mask=(n < N)[:, None] & (r < rank)[None, :], other=0.0)
                for part in tl.static_range(P):
                    is_here = part_of == part
                    if tl.sum(is_here.to(tl.int32), 0) > 0:
                        low = _sum_of_splits(low_ptr, m, is_mine, part, T, P, R, S).to(b.dtype)
                        acc += tl.where(is_here[:, None], tl.dot(b, low, input_precision="ieee"), 0.0)
        at = m.to(tl.int64)[None, :] * N + n[:, None]
        mask = (places >= 0)[None, :] & (n < N)[:, None]
        acc += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def add_updates(x_TK: Tensor, places_T: Tensor, stack: SiteStack, out_TN: Tensor, *, pdl: bool = False) -> None:
    """See `kernels.lora.stack.add_updates`. All contiguous; `places_T` is int32. R is a power of two, 16 at least.

    Equal bits for a row whatever the other rows are, as long as there are at most 16 of them, or more.
    """
    T, K = x_TK.shape
    P, L, R, _ = stack.a_PLRK.shape
    N = len(stack.b_NLR)
    assert x_TK.is_contiguous()
    assert out_TN.is_contiguous()
    assert out_TN.shape == (T, N)
    assert R & (R - 1) == 0
    assert R >= 16
    if not T:
        return
    low = torch.empty(_SPLITS, T, P, R, dtype=torch.float32, device=x_TK.device)
    block_m = _FEW_ROWS if T <= _FEW_ROWS else _ROWS
    first, second = (*stack.bounds, N, N)[:2]
    shared = {"P": P, "L": L, "R": R, "S": _SPLITS, "BM": block_m, "PDL": pdl, "num_warps": 4, "launch_pdl": pdl}
    tiles = triton.cdiv(T, block_m)
    _shrink[(P * L * _SPLITS, tiles)](x_TK, stack.a_PLRK, places_T, stack.ranks_L, low, T, K=K, BK=_BLOCK_K, **shared)
    _expand[(triton.cdiv(N, _BLOCK_N), tiles)](
        low, stack.b_NLR, places_T, stack.ranks_L, out_TN, T, N=N, FIRST=first, SECOND=second,
        INTERLEAVED=stack.is_interleaved, BN=_BLOCK_N, **shared,
    )  # fmt: skip
