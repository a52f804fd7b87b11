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
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tensorweave.kernels.linear.triton_quantize import PEAKS_PER_ROW
from tensorweave.kernels.linear.triton_thin_kernels import GATED, PLAIN, RESIDUAL, gemm, gemm_few, gemv
from tensorweave.kernels.weights import QuantizedWeight

# M rows of x, N outputs, K inputs, Q sums of squares per row of x; blocks of BM, BN, BK; S splits of K


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
        return -(-num_outputs // self.block_n)


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
        if num_rows <= 8:
            return Tiling(8, 16, 512, 4, 4) if epilogue == PLAIN else Tiling(8, 16, 1024, 4, 3)
        return Tiling(16, 16, 512, 4, 3 if epilogue == PLAIN else 4)
    block_m = max(16, triton.next_power_of_2(num_rows))
    assert block_m <= 128, "a thin product has at most 128 rows"
    # So many stages that two or three blocks (to 16 rows), or one, fit on a multiprocessor: the early blocks of a
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


def choose_quantized_tiling(num_rows: int, num_outputs: int, num_inputs: int, epilogue: int) -> Tiling:
    """The same for a `QuantizedWeight`, measured inside a whole step."""
    is_long = num_inputs > 2 * num_outputs
    if num_rows == 1:
        width = min(2048 if is_long else 1024, _largest_power(num_inputs))
        if epilogue == GATED:
            return Tiling(0, 4, width, 2)
        return Tiling(0, 4 if is_long else 8, width, 4)
    block_m = max(16, triton.next_power_of_2(num_rows))
    assert block_m <= 128, "a thin product has at most 128 rows"
    splits = 2 if epilogue == RESIDUAL else 1
    if block_m == 128:
        return Tiling(block_m, 64, 128, 4, 3 if epilogue == GATED else 4, splits)
    if epilogue == GATED:
        return Tiling(block_m, 64, 256, 4, 2)
    if epilogue == RESIDUAL and block_m == 16:
        return Tiling(block_m, 64, 512, 4, 3, splits)
    stages = {16: 4, 32: 5, 64: 4 if is_long else 3}[block_m]
    return Tiling(block_m, 64, 256, 4, stages, splits)


def _largest_power(number: int) -> int:
    """The largest power of two that divides the number; 512 if that is less, and the kernel masks the rest."""
    return max(number & -number, 512)


def thin_linear(
    x_MK: Tensor,
    weight: Tensor | QuantizedWeight,
    out: Tensor | ResidualSum,
    *,
    is_gated: bool = False,
    bias_N: Tensor | None = None,
    squares_MQ: Tensor | None = None,
    epsilon: float = 0.0,
    peaks_MA: Tensor | None = None,
    out_peaks_MA: Tensor | None = None,
    tiling: Tiling | None = None,
    workspace: SplitWorkspace | None = None,
    pdl: bool = False,
) -> None:
    """out = x Wᵀ for few rows, bfloat16 with float32 sums.

    Read rates of the weights of an 8B model at 1 / 8 / 32 / 64 rows, TB/s (H100, 2026-11-26, of 3.2): 28,672 x 4,096
    gated 3.13 / 2.99 / 2.85 / 2.77, 4,096 x 14,336 3.08 / 2.85 / 2.66 / 2.57; cuBLAS 2.89 / 2.85 / 2.79 / 2.71 without
    the activation and 2.69 / 2.69 / 2.62 / 2.55 without the sum.

    Args:
        x_MK: contiguous; with `squares_MQ`, the residual times the norm's gain.
        weight: [N, K], contiguous, at 16 bytes; with `is_gated`, [2 N, K], whose rows alternate gate and up. With a
            `QuantizedWeight`, x is quantized row by row on the way.
        out: [M, N], or a `ResidualSum`.
        is_gated: out = silu(x gateᵀ) * (x upᵀ); without a bias.
        squares_MQ: float32 sums of squares of the residual whose sum over Q is that of the row; the result is
            multiplied by 1 / sqrt(mean + epsilon).
        peaks_MA: of x, see `triton_quantize`; needed with a `QuantizedWeight`.
        out_peaks_MA: raised to the peaks of out, or of `gained`, for a product by a `QuantizedWeight` that follows.
        tiling: from `choose_tiling`; the caller that allocates `ResidualSum.squares_MQ` knows it.
        workspace: needed where the tiling splits K.

    Equal bits for a row whatever the other rows are, as long as the tiling is the same but for `block_m`.
    """
    M, K = x_MK.shape
    is_residual = isinstance(out, ResidualSum)
    result = out.residual_MN if isinstance(out, ResidualSum) else out
    N = result.shape[1]
    epilogue = RESIDUAL if is_residual else GATED if is_gated else PLAIN
    quantized = weight if isinstance(weight, QuantizedWeight) else None
    weight_NK = weight.values_NK if isinstance(weight, QuantizedWeight) else weight
    choose = choose_tiling if quantized is None else choose_quantized_tiling
    tiling = tiling or choose(M, N, K, epilogue)
    assert not (is_gated and (is_residual or bias_N is not None))
    assert x_MK.is_contiguous()
    assert weight_NK.is_contiguous()
    assert weight_NK.shape == (N * 2 if is_gated else N, K)
    assert result.is_contiguous()
    assert (quantized is None) == (peaks_MA is None), "peaks of x go with a quantized weight"
    sums = (out.residual_MN, out.gain_N, out.gained_MN, out.squares_MQ) if isinstance(out, ResidualSum) else (None,) * 4
    if isinstance(out, ResidualSum):
        assert out.squares_MQ.shape == (M, tiling.num_squares(N))
    Q = 1 if squares_MQ is None else squares_MQ.shape[1]
    shared = {
        "N": N, "K": K, "Q": Q, "QP": triton.next_power_of_2(Q), "BN": tiling.block_n, "BK": tiling.block_k,
        "EPILOGUE": epilogue, "SCALED": squares_MQ is not None, "BIAS": bias_N is not None, "PDL": pdl,
        "num_warps": tiling.warps, "launch_pdl": pdl,
    }  # fmt: skip
    scaling = (None if quantized is None else quantized.scales_N, peaks_MA, out_peaks_MA)
    scales = {"A": PEAKS_PER_ROW, "QUANTIZED": quantized is not None, "PEAKS": out_peaks_MA is not None}
    tiles = triton.cdiv(N, tiling.block_n)
    if not tiling.block_m:
        assert M == 1
        is_even = N % tiling.block_n == 0 and K % tiling.block_k == 0
        gemv[(tiles,)](
            x_MK, weight_NK, result, bias_N, squares_MQ, *sums, *scaling, epsilon, EVEN=is_even, **shared, **scales
        )
        return
    assert tiling.block_m >= M
    assert not (tiling.splits > 1 and (is_gated or tiling.block_n < 64))
    if tiling.splits > 1:
        assert workspace is not None, "a split product needs a workspace"
        assert workspace.parts.numel() >= tiles * tiling.block_n * tiling.block_m * tiling.splits
        assert workspace.arrived.numel() >= tiles
    if tiling.block_n < 64:
        assert quantized is None
        assert out_peaks_MA is None
        is_even = weight_NK.shape[0] % tiling.block_n == 0 and K % tiling.block_k == 0
        rows = triton.cdiv(weight_NK.shape[0], tiling.block_n)
        gemm_few[(rows,)](
            x_MK, weight_NK, result, bias_N, squares_MQ, *sums, M, epsilon,
            BM=tiling.block_m, WARPS=tiling.warps, STAGES=tiling.stages, EVEN=is_even, **shared,
        )  # fmt: skip
        return
    spread = weight_NK.view(N, 2 * K) if is_gated else weight_NK
    parts = (None, None) if workspace is None else (workspace.parts, workspace.arrived)
    gemm[(tiles, tiling.splits)](
        TensorDescriptor.from_tensor(x_MK, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(spread, [tiling.block_n, tiling.block_k]),
        weight_NK, result, bias_N, squares_MQ, *sums, *scaling, *parts, M, epsilon,
        BM=tiling.block_m, S=tiling.splits, STAGES=tiling.stages, **shared, **scales,
    )  # fmt: skip
