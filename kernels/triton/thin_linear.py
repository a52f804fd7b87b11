"""Matrix products of few rows, 1 to 128, with what follows them: a decode step's five products per layer and head.

At these sizes a product is a read of its weight. Three things make the read fast: blocks small enough that all
multiprocessors read at once, dependent launch (weights are fetched while the kernel before still runs), and no kernel
between two products. The last needs the norm folded into them: with y = W (x / rms(x) * gain), the product that makes x
also writes x * gain and the sums of squares of its rows of x (`ResidualSum`), and the product that reads it multiplies
W (x * gain) by 1 / rms (`squares_MQ`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

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
def _gemv(
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
def _gemm(
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
def _gemm_few(
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


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: blocks of `block_n` rows of the weight, `block_k` of its columns at a time.

    block_m 0: one row of x, by a kernel without the matrix unit. Less than 64 rows of the weight in a block: by warps'
    matrix instructions, for few rows of x; 64 or more: by wgmma, and then K may be split over several blocks.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    splits: int = 1

    def num_squares(self, num_outputs: int) -> int:
        """Sums of squares per row that a product with a `ResidualSum` writes."""
        return triton.cdiv(num_outputs, self.block_n)


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """What the splits of one launch leave each other. Launches in stream order may share it; the counters stay zero."""

    parts: Tensor
    arrived: Tensor

    @classmethod
    def create(cls, max_outputs: int, max_rows: int, max_splits: int, device: torch.device) -> SplitWorkspace:
        rows = triton.next_power_of_2(max(max_rows, 16))
        return cls(
            torch.empty((max_outputs + 256) * rows * max_splits, dtype=torch.float32, device=device),
            torch.zeros(triton.cdiv(max_outputs, 16), dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class ResidualSum:
    """Where a product's result goes when it is added to the residual.

    residual += result, in place; gained = residual * gain (the weight of the norm that follows); squares[m, tile] = the
    sum of squares of the new residual over each tile of `Tiling.block_n` outputs. All contiguous.
    """

    residual_MN: Tensor
    gain_N: Tensor
    gained_MN: Tensor
    squares_MQ: Tensor


def choose_tiling(num_rows: int, num_outputs: int, num_inputs: int, epilogue: int) -> Tiling:
    """Measured best on an H100 for the shapes of an 8B model (benchmarks/gpu_kernels.md); a guess elsewhere."""
    if num_rows == 1:
        wide = min(2048, _largest_power(num_inputs))
        if epilogue == GATED:
            return Tiling(0, 1, wide, 4)
        return Tiling(0, 2, wide, 4) if epilogue == PLAIN and num_outputs < 65536 else Tiling(0, 4, wide, 8)
    if num_rows <= 16 and num_outputs < 65536:
        return Tiling(8, 16, 1024, 4, 3) if num_rows <= 8 else Tiling(16, 16, 512, 4, 3 if epilogue == PLAIN else 4)
    block_m = max(16, triton.next_power_of_2(num_rows))
    assert block_m <= 128, "a thin product has at most 128 rows"
    # So many stages that two blocks at most (up to 16 rows), or one, fit on a multiprocessor: the early blocks of a
    # dependent launch would pile up on the first that fall free (a step of 8 rows took 6.4 rather than 5.8 ms).
    is_widest = block_m == 128
    if num_outputs >= 65536:
        return Tiling(block_m, 128, 64, 4, 6) if is_widest else Tiling(block_m, 128, 128, 4, 4)
    if epilogue == GATED:
        return Tiling(block_m, 64, 128, 4, 3 if is_widest else 4)
    if epilogue == RESIDUAL:
        splits = 2 if is_widest or num_inputs > 2 * num_outputs else 1
        return Tiling(block_m, 64, 128, 4, 4 if is_widest else 6, splits)
    return Tiling(block_m, 64, 128, 4, 5 if block_m == 16 else 4)


def _largest_power(number: int) -> int:
    """The largest power of two that divides the number; 512 if that is less, and the kernel masks the rest."""
    return max(number & -number, 512)


def thin_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    out: Tensor | ResidualSum,
    *,
    is_gated: bool = False,
    bias_N: Tensor | None = None,
    squares_MQ: Tensor | None = None,
    epsilon: float = 0.0,
    tiling: Tiling | None = None,
    workspace: SplitWorkspace | None = None,
    pdl: bool = False,
) -> None:
    """out = x Wᵀ for few rows, bfloat16 with float32 sums.

    Args:
        x_MK: contiguous; with `squares_MQ`, the residual times the norm's gain.
        weight_NK: contiguous, at 16 bytes; with `is_gated`, [2 N, K], whose rows alternate gate and up.
        out: [M, N], or a `ResidualSum`.
        is_gated: out = silu(x gateᵀ) * (x upᵀ).
        squares_MQ: float32 sums of squares of the residual whose sum over Q is that of the row; the result is
            multiplied by 1 / sqrt(mean + epsilon).
        tiling: from `choose_tiling`; the caller that allocates `ResidualSum.squares_MQ` knows it.
        workspace: needed where the tiling splits K.

    Equal bits for a row whatever the other rows are, as long as the tiling is the same but for `block_m`.
    """
    M, K = x_MK.shape
    is_residual = isinstance(out, ResidualSum)
    result = out.residual_MN if isinstance(out, ResidualSum) else out
    N = result.shape[1]
    epilogue = RESIDUAL if is_residual else GATED if is_gated else PLAIN
    tiling = tiling or choose_tiling(M, N, K, epilogue)
    assert not (is_residual and is_gated)
    assert x_MK.is_contiguous()
    assert weight_NK.is_contiguous()
    assert weight_NK.shape == (N * 2 if is_gated else N, K)
    assert result.is_contiguous()
    sums = (out.residual_MN, out.gain_N, out.gained_MN, out.squares_MQ) if isinstance(out, ResidualSum) else (None,) * 4
    if isinstance(out, ResidualSum):
        assert out.squares_MQ.shape == (M, tiling.num_squares(N))
    Q = 1 if squares_MQ is None else squares_MQ.shape[1]
    shared = {
        "N": N, "K": K, "Q": Q, "QP": triton.next_power_of_2(Q), "BN": tiling.block_n, "BK": tiling.block_k,
        "EPILOGUE": epilogue, "SCALED": squares_MQ is not None, "BIAS": bias_N is not None, "PDL": pdl,
        "num_warps": tiling.warps, "launch_pdl": pdl,
    }  # fmt: skip
    tiles = triton.cdiv(N, tiling.block_n)
    if not tiling.block_m:
        assert M == 1
        is_even = N % tiling.block_n == 0 and K % tiling.block_k == 0
        _gemv[(tiles,)](x_MK, weight_NK, result, bias_N, squares_MQ, *sums, epsilon, EVEN=is_even, **shared)
        return
    assert tiling.block_m >= M
    assert not (tiling.splits > 1 and (is_gated or tiling.block_n < 64))
    if tiling.splits > 1:
        assert workspace is not None, "a split product needs a workspace"
        assert workspace.parts.numel() >= tiles * tiling.block_n * tiling.block_m * tiling.splits
        assert workspace.arrived.numel() >= tiles
    if tiling.block_n < 64:
        is_even = weight_NK.shape[0] % tiling.block_n == 0 and K % tiling.block_k == 0
        rows = triton.cdiv(weight_NK.shape[0], tiling.block_n)
        _gemm_few[(rows,)](
            x_MK, weight_NK, result, bias_N, squares_MQ, *sums, M, epsilon,
            BM=tiling.block_m, WARPS=tiling.warps, STAGES=tiling.stages, EVEN=is_even, **shared,
        )  # fmt: skip
        return
    spread = weight_NK.view(N, 2 * K) if is_gated else weight_NK
    parts = (None, None) if workspace is None else (workspace.parts, workspace.arrived)
    _gemm[(tiles, tiling.splits)](
        TensorDescriptor.from_tensor(x_MK, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(spread, [tiling.block_n, tiling.block_k]),
        weight_NK, result, bias_N, squares_MQ, *sums, *parts, M, epsilon,
        BM=tiling.block_m, S=tiling.splits, STAGES=tiling.stages, **shared,
    )  # fmt: skip
