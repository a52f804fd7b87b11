"""The kernels of `kernels.mixture.triton`, which has the contracts: routing, grouping, and products of few rows.

Products of many rows are in `triton_wide`, of one row in `triton_one`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# T tokens, E experts, S chosen experts of a token, D hidden size, I intermediate width; a pair is a token and one of
# its experts, numbered token * S + place; Q sums of squares per token; blocks of BM pairs, BN outputs, BK inputs


@triton.jit
def route_rows(
    logits_ptr, experts_ptr, weights_ptr, E: tl.constexpr, EP: tl.constexpr, S: tl.constexpr,
    RENORMALIZED: tl.constexpr, ROUNDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program. An expert's place among all is the number of those before it, each pair compared."""
    CHUNK: tl.constexpr = 64 if EP > 64 else EP
    logits_ptr += tl.program_id(0).to(tl.int64) * E
    to = tl.program_id(0).to(tl.int64) * S
    e = tl.arange(0, EP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logits = tl.load(logits_ptr + e, mask=e < E, other=float("-inf")).to(tl.float32)
    rank = tl.zeros((EP,), tl.int32)
    for start in tl.static_range(0, EP, CHUNK):
        other_e = start + tl.arange(0, CHUNK)
        others = tl.load(logits_ptr + other_e, mask=other_e < E, other=float("-inf")).to(tl.float32)
        is_equal = (others[None, :] == logits[:, None]) & (other_e[None, :] < e[:, None])
        rank += tl.sum(((others[None, :] > logits[:, None]) | is_equal).to(tl.int32), 1)
    chosen = (rank < S) & (e < E)
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1
    kept = chosen & (at < S)  # not a number: no more than S all the same
    sizes = tl.exp(logits - tl.max(tl.where(e < E, logits, float("-inf")), 0))
    weights = sizes / tl.sum(tl.where(kept if RENORMALIZED else e < E, sizes, 0.0), 0)
    if ROUNDED:
        weights = weights.to(logits_ptr.dtype.element_ty).to(tl.float32)
    tl.store(experts_ptr + to + at, e, mask=kept)
    tl.store(weights_ptr + to + at, weights, mask=kept)


@triton.jit(do_not_specialize=["count"])
def group_pairs(experts_ptr, starts_ptr, order_ptr, count, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One expert a program: its pairs, ascending, behind those of the experts before it."""
    e = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    before = 0
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        before += tl.sum((tl.load(experts_ptr + i, mask=i < count, other=E) < e).to(tl.int32), 0)
    place = before
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        is_mine = tl.load(experts_ptr + i, mask=i < count, other=E) == e
        tl.store(order_ptr + place + tl.cumsum(is_mine.to(tl.int32), 0) - 1, i, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32), 0)
    tl.store(starts_ptr + e, before)
    if e == E - 1:
        tl.store(starts_ptr + E, count)


@triton.jit
def _silu_mul(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def gated_few(
    x_ptr, w_desc, w_ptr, out_ptr, order_ptr, starts_ptr, squares_ptr, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The weight is the left operand, as the matrix unit wants 64 rows of it. A program reads its part of an expert
    once for each BM pairs; of most experts there are fewer."""
    tiles: tl.constexpr = (WIDTH + BN - 1) // BN
    tile = tl.program_id(0) % tiles
    e = tl.program_id(0) // tiles
    n = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    q = tl.arange(0, QP)
    gate_ptr = w_ptr + (e.to(tl.int64) * WIDTH + n)[:, None] * (2 * D) + k[None, :]
    EVEN: tl.constexpr = D % BK == 0 and WIDTH % BN == 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    last = tl.load(starts_ptr + e + 1)
    for first in range(tl.load(starts_ptr + e), last, BM):
        m = first + tl.arange(0, BM)
        token = tl.load(order_ptr + m, mask=m < last, other=0) // S
        rows = x_ptr + token.to(tl.int64)[:, None] * D + k[None, :]
        acc = tl.zeros((BN, BM), tl.float32)
        up_acc = tl.zeros((BN, BM), tl.float32)
        for start in tl.range(0, D, BK, num_stages=STAGES):
            if D % BK == 0:
                x = tl.load(rows + start)
            else:
                x = tl.load(rows + start, mask=(start + k < D)[None, :], other=0.0)
            if TMA:  # a row of the descriptor is a gate row and its up row, end to end
                gate = w_desc.load([e * WIDTH + tile * BN, start])
                up = w_desc.load([e * WIDTH + tile * BN, D + start])
            elif EVEN:
                gate = tl.load(gate_ptr + start, eviction_policy="evict_first")
                up = tl.load(gate_ptr + D + start, eviction_policy="evict_first")
            else:
                mask = (n < WIDTH)[:, None] & (start + k < D)[None, :]
                gate = tl.load(gate_ptr + start, mask=mask, other=0.0)
                up = tl.load(gate_ptr + D + start, mask=mask, other=0.0)
            acc = tl.dot(gate, x.T, acc, input_precision="ieee")
            up_acc = tl.dot(up, x.T, up_acc, input_precision="ieee")
        if SCALED:
            squares_at = squares_ptr + token[:, None] * Q + q[None, :]
            squares = tl.load(squares_at, mask=(m < last)[:, None] & (q < Q)[None, :], other=0.0)
            factor = tl.rsqrt(tl.sum(squares, 1) / D + epsilon)[None, :]
            acc *= factor
            up_acc *= factor
        at = m[None, :].to(tl.int64) * WIDTH + n[:, None]
        result = _silu_mul(acc, up_acc).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, result, mask=(m < last)[None, :] & (n < WIDTH)[:, None])


@triton.jit
def down_few(
    x_ptr, w_desc, w_ptr, out_ptr, order_ptr, starts_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of x are pairs in their order; those of out are numbered by pair."""
    tiles: tl.constexpr = (D + BN - 1) // BN
    tile = tl.program_id(0) % tiles
    e = tl.program_id(0) // tiles
    n = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_row = w_ptr + (e.to(tl.int64) * D + n)[:, None] * WIDTH + k[None, :]
    EVEN: tl.constexpr = WIDTH % BK == 0 and D % BN == 0
    # Who groups has run when the kernel that waits for it lets this one start: before the wait.
    first_pair, last = tl.load(starts_ptr + e), tl.load(starts_ptr + e + 1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(first_pair, last, BM):
        m = first + tl.arange(0, BM)
        pair = tl.load(order_ptr + m, mask=m < last, other=0)
        rows = x_ptr + m.to(tl.int64)[:, None] * WIDTH + k[None, :]
        acc = tl.zeros((BN, BM), tl.float32)
        for start in tl.range(0, WIDTH, BK, num_stages=STAGES):
            x = tl.load(rows + start, mask=(m < last)[:, None] & (start + k < WIDTH)[None, :], other=0.0)
            if TMA:
                w = w_desc.load([e * D + tile * BN, start])
            elif EVEN:
                w = tl.load(w_row + start, eviction_policy="evict_first")
            else:
                w = tl.load(w_row + start, mask=(n < D)[:, None] & (start + k < WIDTH)[None, :], other=0.0)
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        at = pair[None, :].to(tl.int64) * D + n[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(m < last)[None, :] & (n < D)[:, None])


@triton.jit
def sum_parts(
    parts_ptr, weights_ptr, residual_ptr, gain_ptr, gained_ptr, squares_ptr,
    D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, GAINED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: its parts in the order of the experts' numbers, added to the residual, rounded once."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    if GAINED:
        gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((DP,), tl.float32)
    for s in tl.static_range(S):
        part = tl.load(parts_ptr + (t * S + s) * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + t * S + s) * part
    x = tl.load(residual_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32) + acc
    rounded = x.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + t * D + d, rounded, mask=d < D)
    if GAINED:
        x = rounded.to(tl.float32)
        tl.store(gained_ptr + t * D + d, (x * gain).to(gained_ptr.dtype.element_ty), mask=d < D)
        tl.store(squares_ptr + t, tl.sum(x * x, 0))
