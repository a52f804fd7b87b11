"""The kernels of `thin_linear`, which has the contracts."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# M rows of x, N outputs, K inputs, Q sums of squares per row of x; blocks of BM, BN, BK; S splits of K

PLAIN, GATED, RESIDUAL = 0, 1, 2
_PLAIN, _GATED, _RESIDUAL = tl.constexpr(PLAIN), tl.constexpr(GATED), tl.constexpr(RESIDUAL)


@triton.jit
def _rstd(squares, K: tl.constexpr, epsilon):
    return tl.rsqrt(squares / K + epsilon)


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def gemv(
    x_ptr, w_ptr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr, epsilon,
    N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EPILOGUE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    q = tl.arange(0, QP)
    row = w_ptr + (n * 2 if EPILOGUE == _GATED else n).to(tl.int64)[:, None] * K + k[None, :]
    first_mask = None if EVEN else (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(row, mask=first_mask, eviction_policy="evict_first")  # weights do not change: before the wait
    if EPILOGUE == _GATED:
        up = tl.load(row + K, mask=first_mask, eviction_policy="evict_first")
    if EPILOGUE == _RESIDUAL:
        gain = tl.load(gain_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SCALED:
        squares = tl.load(squares_ptr + q, mask=q < Q, other=0.0)
    if EPILOGUE == _RESIDUAL:
        residual = tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    acc = tl.zeros((BN, BK), tl.float32)
    acc_up = tl.zeros((BN, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        mask = None if EVEN else (n < N)[:, None] & (start + k < K)[None, :]
        x_mask = None if EVEN else start + k < K
        x = tl.load(x_ptr + start + k, mask=x_mask, eviction_policy="evict_last").to(tl.float32)[None, :]
        if start > 0:
            w = tl.load(row + start, mask=mask, eviction_policy="evict_first")
            if EPILOGUE == _GATED:
                up = tl.load(row + K + start, mask=mask, eviction_policy="evict_first")
        if EVEN:
            acc += w.to(tl.float32) * x
            if EPILOGUE == _GATED:
                acc_up += up.to(tl.float32) * x
        else:
            acc += tl.where(mask, w.to(tl.float32) * x, 0.0)
            if EPILOGUE == _GATED:
                acc_up += tl.where(mask, up.to(tl.float32) * x, 0.0)
    y = tl.sum(acc, 1)
    if SCALED:
        factor = _rstd(tl.sum(squares, 0), K, epsilon)
        y *= factor
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if EPILOGUE == _GATED:
        y_up = tl.sum(acc_up, 1)
        if SCALED:
            y_up *= factor
        y = _silu(y) * y_up
    if EPILOGUE == _RESIDUAL:
        y = (y + residual).to(residual_ptr.dtype.element_ty).to(tl.float32)
        tl.store(residual_ptr + n, y.to(residual_ptr.dtype.element_ty), mask=n < N)
        tl.store(gained_ptr + n, (y * gain).to(gained_ptr.dtype.element_ty), mask=n < N)
        tl.store(squares_out_ptr + tl.program_id(0), tl.sum(y * y, 0))
    else:
        tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _prefetch_l2(ptr):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _finish(
    acc, up, m, n, tile, M, N: tl.constexpr, K: tl.constexpr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr,
    gained_ptr, squares_out_ptr, epsilon, Q: tl.constexpr, QP: tl.constexpr, EPILOGUE: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """What follows a product: acc and up are [outputs n, rows m]."""
    q = tl.arange(0, QP)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    if SCALED:
        squares_mask = (m < M)[:, None] & (q < Q)[None, :]
        squares = tl.load(squares_ptr + m[:, None] * Q + q[None, :], mask=squares_mask, other=0.0)
        factor = _rstd(tl.sum(squares, 1), K, epsilon)[None, :]
        acc *= factor
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == _GATED:
        if SCALED:
            up *= factor
        acc = _silu(acc) * up
    if EPILOGUE == _RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        acc = acc.to(residual_ptr.dtype.element_ty).to(tl.float32)
        gain = tl.load(gain_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(residual_ptr + at, acc.to(residual_ptr.dtype.element_ty), mask=mask)
        tl.store(gained_ptr + at, (acc * gain[:, None]).to(gained_ptr.dtype.element_ty), mask=mask)
        tl.store(squares_out_ptr + m * tl.num_programs(0) + tile, tl.sum(acc * acc, 0), mask=m < M)
    else:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gemm(
    x_desc, w_desc, w_ptr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr,
    parts_ptr, arrived_ptr, M, epsilon,
    N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight is the left operand, 64 rows or more at a time as the matrix unit wants; x is padded to BM columns."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    per: tl.constexpr = (K + S * BK - 1) // (S * BK) * BK
    begin = split * per
    if PDL:
        line = n.to(tl.int64)[:, None] * K + begin + tl.arange(0, BK // 64)[None, :] * 64
        if EPILOGUE != _GATED and N % BN == 0 and K % (S * BK) == 0:
            _prefetch_l2(w_ptr + line)
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(begin, tl.minimum(begin + per, K), BK, num_stages=STAGES):
        x = x_desc.load([0, k]).T  # zeros past K and M
        acc = tl.dot(w_desc.load([tile * BN, k]), x, acc)
        if EPILOGUE == _GATED:  # a row of the descriptor is a gate row and its up row, end to end
            up = tl.dot(w_desc.load([tile * BN, K + k]), x, up)
    is_last = True
    if S > 1:
        part = parts_ptr + ((tile * S + split) * BN + tl.arange(0, BN))[:, None] * BM + m[None, :]
        tl.store(part, acc)
        tl.debug_barrier()  # all threads' parts are written before this program is counted
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == S - 1
        if is_last:
            tl.store(arrived_ptr + tile, 0)
            acc = tl.zeros((BN, BM), tl.float32)
            part = parts_ptr + (tile * S * BN + tl.arange(0, BN))[:, None] * BM + m[None, :]
            for i in tl.static_range(S):  # always in this order: equal bits
                acc += tl.load(part + i * BN * BM, cache_modifier=".cg")
    if is_last:
        _finish(
            acc, up, m, n, tile, M, N, K, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr,
            squares_out_ptr, epsilon, Q, QP, EPILOGUE, SCALED, BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_few(
    x_ptr, w_ptr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr, M, epsilon,
    N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Blocks of few rows of the weight load all multiprocessors evenly: a batched product, a part of K per warp."""
    tile = tl.program_id(0)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    row = tile * BN + tl.arange(0, BN)
    rows: tl.constexpr = 2 * N if EPILOGUE == _GATED else N
    w_block = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    x_block = x_ptr + m[:, None] * K + k[None, :]
    if PDL:
        if EVEN:
            _prefetch_l2(w_ptr + row.to(tl.int64)[:, None] * K + tl.arange(0, BK // 64)[None, :] * 64)
        gdc_wait()
        gdc_launch_dependents()
    parts = tl.zeros((WARPS, BN, BM), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        in_k = (start + k < K)[None, :]
        w_mask = None if EVEN else in_k & (row < rows)[:, None]
        x_mask = (m < M)[:, None] if EVEN else in_k & (m < M)[:, None]
        w = tl.load(w_block + start, mask=w_mask, other=None if EVEN else 0.0, eviction_policy="evict_first")
        x = tl.load(x_block + start, mask=x_mask, other=0.0)
        w = w.reshape(BN, WARPS, BK // WARPS).permute(1, 0, 2)
        parts = tl.dot(w, x.reshape(BM, WARPS, BK // WARPS).permute(1, 2, 0), parts)
    acc = tl.sum(parts, 0)
    if EPILOGUE == _GATED:  # rows alternate gate and up
        gate, up = tl.split(acc.reshape(BN // 2, 2, BM).permute(0, 2, 1))
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
        _finish(
            gate, up, m, n, tile, M, N, K, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr,
            squares_out_ptr, epsilon, Q, QP, EPILOGUE, SCALED, BIAS,
        )  # fmt: skip
    else:
        _finish(
            acc, acc, m, row, tile, M, N, K, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr,
            squares_out_ptr, epsilon, Q, QP, EPILOGUE, SCALED, BIAS,
        )  # fmt: skip
