"""The experts of one token: matrix products with vectors, as `kernels.linear.triton_thin_kernels.gemv` has them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# S chosen experts, D hidden size, I intermediate width; Q sums of squares of x; blocks of BN outputs, BK inputs


@triton.jit
def gated_one(
    x_ptr, w_ptr, out_ptr, experts_ptr, squares_ptr, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (WIDTH + BN - 1) // BN
    s = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    q = tl.arange(0, QP)
    EVEN: tl.constexpr = D % BK == 0 and WIDTH % BN == 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.load(experts_ptr + s).to(tl.int64)
    row = w_ptr + (e * WIDTH + n)[:, None] * (2 * D) + k[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    acc_up = tl.zeros((BN, BK), tl.float32)
    for start in tl.static_range(0, D, BK):
        mask = None if EVEN else (n < WIDTH)[:, None] & (start + k < D)[None, :]
        gate = tl.load(row + start, mask=mask, other=None if EVEN else 0.0, eviction_policy="evict_first")
        up = tl.load(row + D + start, mask=mask, other=None if EVEN else 0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + k, mask=start + k < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
        acc += gate.to(tl.float32) * x[None, :]
        acc_up += up.to(tl.float32) * x[None, :]
    gate_sum, up_sum = tl.sum(acc, 1), tl.sum(acc_up, 1)
    if SCALED:
        squares = tl.load(squares_ptr + q, mask=q < Q, other=0.0)
        factor = tl.rsqrt(tl.sum(squares, 0) / D + epsilon)
        gate_sum *= factor
        up_sum *= factor
    gated = gate_sum / (1 + tl.exp(-gate_sum)) * up_sum
    tl.store(out_ptr + s * WIDTH + n, gated.to(out_ptr.dtype.element_ty), mask=n < WIDTH)


@triton.jit
def down_one(
    x_ptr, w_ptr, experts_ptr, weights_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums over experts in the order of their numbers, adds to the residual: a `ResidualSum`."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    steps: tl.constexpr = (WIDTH + BK - 1) // BK
    EVEN: tl.constexpr = WIDTH % BK == 0 and D % BN == 0
    gain = tl.load(gain_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    # Who routes has run when the kernel that waits for it lets this one start: before the wait.
    first_mask = None if EVEN else (n < D)[:, None] & (k < WIDTH)[None, :]
    first_row = w_ptr + (tl.load(experts_ptr).to(tl.int64) * D + n)[:, None] * WIDTH + k[None, :]
    first = tl.load(first_row, mask=first_mask, other=None if EVEN else 0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    residual = tl.load(residual_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    acc = tl.zeros((BN, BK), tl.float32)
    for s in tl.static_range(S):
        e = tl.load(experts_ptr + s).to(tl.int64)
        weight = tl.load(weights_ptr + s)
        row = w_ptr + (e * D + n)[:, None] * WIDTH + k[None, :]
        for step in tl.static_range(steps):
            i = step * BK + k
            mask = None if EVEN else (n < D)[:, None] & (i < WIDTH)[None, :]
            w = first
            if s > 0 or step > 0:
                w = tl.load(row + step * BK, mask=mask, other=None if EVEN else 0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + s * WIDTH + i, mask=i < WIDTH, other=0.0, eviction_policy="evict_last").to(tl.float32)
            acc += w.to(tl.float32) * (x * weight)[None, :]
    rounded = (tl.sum(acc, 1) + residual).to(residual_ptr.dtype.element_ty)
    y = rounded.to(tl.float32)
    tl.store(residual_ptr + n, rounded, mask=n < D)
    tl.store(gained_ptr + n, (y * gain).to(gained_ptr.dtype.element_ty), mask=n < D)
    tl.store(squares_out_ptr + tl.program_id(0), tl.sum(y * y, 0))
