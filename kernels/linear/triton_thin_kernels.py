"""The kernels of `thin_linear`, which has the contracts."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensorweave.kernels.linear.thin_tiling import GATED, PLAIN, RESIDUAL
from tensorweave.kernels.linear.triton_quantize import load_peaks, load_row_scales, raise_peaks, row_scale
from tensorweave.kernels.lora.triton_expand import add_low_rank

# M rows of x, N outputs, K inputs, Q sums of squares and A peaks per row of x; blocks of BM, BN, BK; S splits of K

_HALF_SUMS = tl.constexpr(8)  # products of e4m3 that are summed in float16, exact each, before the sum goes to float32
_DOWN, _UP = (
    tl.constexpr(1 / 256),
    tl.constexpr(256.0),
)  # x in float16, so that eight sums stay far from its largest number
_PREFETCHED = tl.constexpr(256)  # columns of B, at most: of so many, each has an adapter that is likely to be used
_PLAIN, _GATED, _RESIDUAL = tl.constexpr(PLAIN), tl.constexpr(GATED), tl.constexpr(RESIDUAL)


@triton.jit
def _rstd(squares, K: tl.constexpr, epsilon):
    return tl.rsqrt(squares / K + epsilon)


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _fma_half(a, b, c):
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _empty_half(acc, half, BN: tl.constexpr, BK: tl.constexpr):
    """Sums in float16 go to those in float32."""
    return acc + half.to(tl.float32), tl.zeros((BN, BK), tl.float16)


@triton.jit
def _products(w, x, mask, EVEN: tl.constexpr):
    products = w.to(tl.float32) * x[None, :]
    return products if EVEN else tl.where(mask, products, 0.0)


@triton.jit
def _finish_one(
    acc, acc_up, n, squares, scale, scale_up, x_scale, residual, gain, epsilon, out_ptr, bias_ptr, residual_ptr,
    gained_ptr, squares_out_ptr, peaks_out_ptr, N: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    EPILOGUE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, QUANTIZED: tl.constexpr, PEAKS: tl.constexpr,
):  # fmt: skip
    """What follows the product of one row."""
    y = tl.sum(acc, 1)
    if QUANTIZED:
        y *= scale * (x_scale * _UP)
    if SCALED:
        factor = _rstd(tl.sum(squares, 0), K, epsilon)
        y *= factor
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if EPILOGUE == _GATED:
        y_up = tl.sum(acc_up, 1)
        if QUANTIZED:
            y_up *= scale_up * (x_scale * _UP)
        if SCALED:
            y_up *= factor
        y = _silu(y) * y_up
    if EPILOGUE == _RESIDUAL:
        y = (y + residual).to(residual_ptr.dtype.element_ty).to(tl.float32)
        tl.store(residual_ptr + n, y.to(residual_ptr.dtype.element_ty), mask=n < N)
        result = (y * gain).to(gained_ptr.dtype.element_ty)
        tl.store(gained_ptr + n, result, mask=n < N)
        tl.store(squares_out_ptr + tl.program_id(0), tl.sum(y * y, 0))
    else:
        result = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + n, result, mask=n < N)
    if PEAKS:
        peak = tl.max(tl.where(n < N, tl.abs(result.to(tl.float32)), 0.0), 0)
        raise_peaks(peaks_out_ptr, tl.program_id(0) % A, peak, None)


@triton.jit
def gemv(
    x_ptr, w_ptr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr,
    scales_ptr, peaks_ptr, peaks_out_ptr, epsilon,
    N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, A: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, QUANTIZED: tl.constexpr,
    PEAKS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    q = tl.arange(0, QP)
    row = w_ptr + (n * 2 if EPILOGUE == _GATED else n).to(tl.int64)[:, None] * K + k[None, :]
    first_mask = None if EVEN else (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(row, mask=first_mask, eviction_policy="evict_first")  # weights do not change: before the wait
    if EPILOGUE == _GATED:
        up = tl.load(row + K, mask=first_mask, eviction_policy="evict_first")
    gain, residual, squares, scale, scale_up, x_scale = None, None, None, None, None, None
    if EPILOGUE == _RESIDUAL:
        gain = tl.load(gain_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if QUANTIZED:
        scale = tl.load(scales_ptr + (n * 2 if EPILOGUE == _GATED else n), mask=n < N, other=0.0)
        if EPILOGUE == _GATED:
            scale_up = tl.load(scales_ptr + n * 2 + 1, mask=n < N, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if QUANTIZED:
        x_scale = row_scale(tl.max(load_peaks(peaks_ptr + tl.arange(0, A)), 0))
        x_inverse = tl.div_rn(1.0, x_scale)
    if SCALED:
        squares = tl.load(squares_ptr + q, mask=q < Q, other=0.0)
    if EPILOGUE == _RESIDUAL:
        residual = tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    acc = tl.zeros((BN, BK), tl.float32)
    acc_up = tl.zeros((BN, BK), tl.float32)
    half = tl.zeros((BN, BK), tl.float16)
    half_up = tl.zeros((BN, BK), tl.float16)
    for start in tl.static_range(0, K, BK):
        mask = None if EVEN else (n < N)[:, None] & (start + k < K)[None, :]
        x_mask = None if EVEN else start + k < K
        x = tl.load(x_ptr + start + k, mask=x_mask, eviction_policy="evict_last").to(tl.float32)
        if start > 0:
            w = tl.load(row + start, mask=mask, eviction_policy="evict_first")
            if EPILOGUE == _GATED:
                up = tl.load(row + K + start, mask=mask, eviction_policy="evict_first")
        if QUANTIZED:
            x16 = ((x * x_inverse).to(tl.float8e4nv).to(tl.float16) * _DOWN)[None, :]
            if not EVEN:
                x16 = tl.where((start + k < K)[None, :], x16, 0.0)
                w = tl.where(mask, w.to(tl.float16), 0.0)
                if EPILOGUE == _GATED:
                    up = tl.where(mask, up.to(tl.float16), 0.0)
            half = _fma_half(w.to(tl.float16), x16, half)
            if EPILOGUE == _GATED:
                half_up = _fma_half(up.to(tl.float16), x16, half_up)
            if (start // BK) % _HALF_SUMS == _HALF_SUMS - 1 or start + BK >= K:
                acc, half = _empty_half(acc, half, BN, BK)
                if EPILOGUE == _GATED:
                    acc_up, half_up = _empty_half(acc_up, half_up, BN, BK)
        else:
            acc += _products(w, x, mask, EVEN)
            if EPILOGUE == _GATED:
                acc_up += _products(up, x, mask, EVEN)
    _finish_one(
        acc, acc_up, n, squares, scale, scale_up, x_scale, residual, gain, epsilon, out_ptr, bias_ptr, residual_ptr,
        gained_ptr, squares_out_ptr, peaks_out_ptr, N, K, A, EPILOGUE, SCALED, BIAS, QUANTIZED, PEAKS,
    )  # fmt: skip


@triton.jit
def _prefetch_l2(ptr):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _finish(
    acc, up, m, n, tile, M, N: tl.constexpr, K: tl.constexpr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr,
    gained_ptr, squares_out_ptr, scales_ptr, x_scale, peaks_out_ptr, epsilon, Q: tl.constexpr, QP: tl.constexpr,
    A: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, QUANTIZED: tl.constexpr,
    PEAKS: tl.constexpr,
):  # fmt: skip
    """What follows a product: acc and up are [outputs n, rows m]."""
    q = tl.arange(0, QP)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    if QUANTIZED:
        scales = scales_ptr + (n * 2 if EPILOGUE == _GATED else n)
        acc *= tl.load(scales, mask=n < N, other=0.0)[:, None] * x_scale[None, :]
        if EPILOGUE == _GATED:
            up *= tl.load(scales + 1, mask=n < N, other=0.0)[:, None] * x_scale[None, :]
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
        result = (acc * gain[:, None]).to(gained_ptr.dtype.element_ty)
        tl.store(gained_ptr + at, result, mask=mask)
        tl.store(squares_out_ptr + m * tl.num_programs(0) + tile, tl.sum(acc * acc, 0), mask=m < M)
    else:
        result = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, result, mask=mask)
    if PEAKS:
        peaks = tl.max(tl.where(mask, tl.abs(result.to(tl.float32)), 0.0), 0)
        raise_peaks(peaks_out_ptr, m * A + tile % A, peaks, m < M)


@triton.jit(do_not_specialize=["M"])
def gemm(
    x_desc, w_desc, w_ptr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr,
    scales_ptr, peaks_ptr, peaks_out_ptr, parts_ptr, arrived_ptr, b_ptr, low_ptr, places_ptr, M, epsilon,
    N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, A: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, LR: tl.constexpr, R: tl.constexpr,
    P: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BE: tl.constexpr, EPILOGUE: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, QUANTIZED: tl.constexpr, PEAKS: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The weight is the left operand, 64 rows or more at a time as the matrix unit wants; x is padded to BM columns.
    LR, if any, are the columns of adapters' B; EARLY: x is there when the kernel starts, only `low` is not."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    per: tl.constexpr = (K + S * BK - 1) // (S * BK) * BK
    begin = split * per
    LINE: tl.constexpr = 128 if QUANTIZED else 64  # elements of 128 bytes
    if PDL:
        line = n.to(tl.int64)[:, None] * K + begin + tl.arange(0, BK // LINE)[None, :] * LINE
        if EPILOGUE != _GATED and N % BN == 0 and K % (S * BK) == 0:
            _prefetch_l2(w_ptr + line)
        if LR > 0 and LR <= _PREFETCHED:
            columns: tl.constexpr = 2 * LR if EPILOGUE == _GATED else LR
            lines: tl.constexpr = (columns + 63) // 64
            line = n.to(tl.int64)[:, None] * columns + tl.arange(0, triton.next_power_of_2(lines))[None, :] * 64
            _prefetch_l2(b_ptr + tl.minimum(line, N * columns - 1))
        if not EARLY:
            gdc_wait()
        gdc_launch_dependents()
    if LR > 0:
        places = tl.load(places_ptr + m, mask=m < M, other=-1)
    x_scale = 1.0
    if QUANTIZED:
        x_scale, x_inverse = load_row_scales(peaks_ptr, m, M, A)
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(begin, tl.minimum(begin + per, K), BK, num_stages=STAGES):
        x = x_desc.load([0, k])  # zeros past K and M
        if QUANTIZED:
            x = (x.to(tl.float32) * x_inverse[:, None]).to(tl.float8e4nv)
        x = x.T
        acc = tl.dot(w_desc.load([tile * BN, k]), x, acc)
        if EPILOGUE == _GATED:  # a row of the descriptor is a gate row and its up row, end to end
            up = tl.dot(w_desc.load([tile * BN, K + k]), x, up)
    if PDL and EARLY:
        gdc_wait()
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
        if LR > 0:
            acc, up = add_low_rank(
                acc, up, places, m, n, tile, b_ptr, low_ptr, N, LR, R, P, FIRST, SECOND, BN, BE, EPILOGUE == _GATED
            )
        _finish(
            acc, up, m, n, tile, M, N, K, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr,
            squares_out_ptr, scales_ptr, x_scale, peaks_out_ptr, epsilon, Q, QP, A, EPILOGUE, SCALED, BIAS, QUANTIZED,
            PEAKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_few(
    x_ptr, w_ptr, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr, squares_out_ptr,
    M, epsilon,
    N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, EPILOGUE: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
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
            squares_out_ptr, None, 1.0, None, epsilon, Q, QP, 1, EPILOGUE, SCALED, BIAS, False, False,
        )  # fmt: skip
    else:
        _finish(
            acc, acc, m, row, tile, M, N, K, out_ptr, bias_ptr, squares_ptr, residual_ptr, gain_ptr, gained_ptr,
            squares_out_ptr, None, 1.0, None, epsilon, Q, QP, 1, EPILOGUE, SCALED, BIAS, False, False,
        )  # fmt: skip
