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
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tensorweave.kernels.linear.cuda_few import Residual, few_linear
from tensorweave.kernels.linear.cuda_grouped import grouped_few_linear
from tensorweave.kernels.linear.thin_tiling import (
    FEW_TILING,
    GATED,
    PLAIN,
    RESIDUAL,
    Tiling,
    choose_quantized_tiling,
    choose_tiling,
)
from tensorweave.kernels.linear.triton_quantize import PEAKS_PER_ROW
from tensorweave.kernels.linear.triton_thin_kernels import gemm, gemm_few, gemv
from tensorweave.kernels.lora.update import LowRankUpdate, outputs_fit
from tensorweave.kernels.weights import PackedCodes, QuantizedWeight

# M rows of x, N outputs, K inputs, Q sums of squares per row of x; blocks of BM, BN, BK; S splits of K


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


def thin_linear(
    x_MK: Tensor,
    weight: Tensor | QuantizedWeight | PackedCodes,
    out: Tensor | ResidualSum,
    *,
    is_gated: bool = False,
    bias_N: Tensor | None = None,
    squares_MQ: Tensor | None = None,
    epsilon: float = 0.0,
    peaks_MA: Tensor | None = None,
    out_peaks_MA: Tensor | None = None,
    update: LowRankUpdate | None = None,
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
            `QuantizedWeight`, x is quantized row by row on the way. `PackedCodes` take at most 16 rows, and have one
            tiling.
        out: [M, N], or a `ResidualSum`.
        is_gated: out = silu(x gateᵀ) * (x upᵀ); without a bias.
        squares_MQ: float32 sums of squares of the residual whose sum over Q is that of the row; the result is
            multiplied by 1 / sqrt(mean + epsilon).
        peaks_MA: of x, see `triton_quantize`; needed with a `QuantizedWeight`.
        out_peaks_MA: raised to the peaks of out, or of `gained`, for a product by a `QuantizedWeight` that follows.
        update: added before all that follows the product: before the factor of `squares_MQ`, because A x has it, too.
            Needs a tiling of 64 rows of the weight or more, or `FEW_TILING`; not with a `QuantizedWeight`.
        tiling: from `choose_tiling`; the caller that allocates `ResidualSum.squares_MQ` knows it.
        workspace: needed where the tiling splits K.

    Equal bits for a row whatever the other rows are, as long as the tiling is the same but for `block_m`.
    """
    if isinstance(weight, PackedCodes):
        assert update is None
        residual = None if isinstance(out, Tensor) else (out.residual_MN, out.gain_N, out.gained_MN, out.squares_MQ)
        grouped_few_linear(
            x_MK, weight, out if isinstance(out, Tensor) else None, is_gated=is_gated, bias_N=bias_N,
            squares_MQ=squares_MQ, epsilon=epsilon, residual=residual, pdl=pdl,
        )  # fmt: skip
        return
    choose = choose_quantized_tiling if isinstance(weight, QuantizedWeight) else choose_tiling
    rows = out.residual_MN if isinstance(out, ResidualSum) else out
    epilogue = RESIDUAL if isinstance(out, ResidualSum) else GATED if is_gated else PLAIN
    tiling = tiling or choose(rows.shape[0], rows.shape[1], x_MK.shape[1], epilogue)
    product = _Product(
        x_MK, weight, out, epilogue, bias_N, squares_MQ, epsilon, peaks_MA, out_peaks_MA, update, tiling, workspace,
        pdl,
    )  # fmt: skip
    product.check()
    product.launch()


@dataclass(frozen=True, slots=True)
class _Product:
    """A call of `thin_linear`."""

    x_MK: Tensor
    weight: Tensor | QuantizedWeight
    out: Tensor | ResidualSum
    epilogue: int
    bias_N: Tensor | None
    squares_MQ: Tensor | None
    epsilon: float
    peaks_MA: Tensor | None
    out_peaks_MA: Tensor | None
    update: LowRankUpdate | None
    tiling: Tiling
    workspace: SplitWorkspace | None
    pdl: bool

    @property
    def weight_NK(self) -> Tensor:
        return self.weight.values_NK if isinstance(self.weight, QuantizedWeight) else self.weight

    @property
    def scales_N(self) -> Tensor | None:
        return self.weight.scales_N if isinstance(self.weight, QuantizedWeight) else None

    @property
    def result_MN(self) -> Tensor:
        return self.out.residual_MN if isinstance(self.out, ResidualSum) else self.out

    @property
    def num_tiles(self) -> int:
        return -(-self.result_MN.shape[1] // self.tiling.block_n)

    def check(self) -> None:
        (M, N), tiling, workspace = self.result_MN.shape, self.tiling, self.workspace
        is_gated = self.epilogue == GATED
        assert not (is_gated and self.bias_N is not None)
        assert self.x_MK.is_contiguous()
        assert self.weight_NK.is_contiguous()
        assert self.weight_NK.shape == (N * 2 if is_gated else N, self.x_MK.shape[1])
        assert self.result_MN.is_contiguous()
        assert (self.scales_N is None) == (self.peaks_MA is None), "peaks of x go with a quantized weight"
        assert tiling.block_m >= M or (M == 1 and not tiling.block_m)
        if isinstance(self.out, ResidualSum):
            assert self.out.squares_MQ.shape == (M, tiling.num_squares(N))
        if tiling.block_m > 0 and tiling.block_n < 64:
            assert self.scales_N is None
            assert self.out_peaks_MA is None
        if self.update is not None:
            assert self.scales_N is None
            assert tiling.block_n >= 64 or tiling == FEW_TILING
            assert tiling == FEW_TILING or outputs_fit(self.update.stack, tiling.block_n)
            self.update.check(M, len(self.weight_NK), is_gated=is_gated)
        if tiling.splits > 1:
            assert not is_gated
            assert tiling.block_n >= 64
            assert workspace is not None, "a split product needs a workspace"
            assert workspace.parts.numel() >= self.num_tiles * tiling.block_n * tiling.block_m * tiling.splits
            assert workspace.arrived.numel() >= self.num_tiles

    def launch(self) -> None:
        if self.tiling == FEW_TILING:
            self._run_few()
        elif not self.tiling.block_m:
            self._run_gemv()
        elif self.tiling.block_n < 64:
            self._run_gemm_few()
        else:
            self._run_gemm()

    def _run_few(self) -> None:
        residual = self._residual if isinstance(self.out, ResidualSum) else None
        few_linear(
            self.x_MK, self.weight_NK, None if residual else self.result_MN, is_gated=self.epilogue == GATED,
            bias_N=self.bias_N, squares_MQ=self.squares_MQ, epsilon=self.epsilon, residual=residual,
            update=self.update, pdl=self.pdl,
        )  # fmt: skip

    def _run_gemv(self) -> None:
        N, K, tiling = self.result_MN.shape[1], self.x_MK.shape[1], self.tiling
        is_even = N % tiling.block_n == 0 and K % tiling.block_k == 0
        gemv[(self.num_tiles,)](
            self.x_MK, self.weight_NK, *self._operands, *self._scaling, self.epsilon, EVEN=is_even, **self._constants,
            **self._scaling_constants,
        )  # fmt: skip

    def _run_gemm_few(self) -> None:
        (rows, K), tiling = self.weight_NK.shape, self.tiling
        is_even = rows % tiling.block_n == 0 and K % tiling.block_k == 0
        gemm_few[(triton.cdiv(rows, tiling.block_n),)](
            self.x_MK, self.weight_NK, *self._operands, len(self.x_MK), self.epsilon,
            BM=tiling.block_m, WARPS=tiling.warps, STAGES=tiling.stages, EVEN=is_even, **self._constants,
        )  # fmt: skip

    def _run_gemm(self) -> None:
        N, K, tiling, weight_NK = self.result_MN.shape[1], self.x_MK.shape[1], self.tiling, self.weight_NK
        spread = weight_NK.view(N, 2 * K) if self.epilogue == GATED else weight_NK
        parts = (None, None) if self.workspace is None else (self.workspace.parts, self.workspace.arrived)
        gemm[(self.num_tiles, tiling.splits)](
            TensorDescriptor.from_tensor(self.x_MK, [tiling.block_m, tiling.block_k]),
            TensorDescriptor.from_tensor(spread, [tiling.block_n, tiling.block_k]),
            weight_NK, *self._operands, *self._scaling, *parts, *self._update_operands, len(self.x_MK), self.epsilon,
            BM=tiling.block_m, S=tiling.splits, STAGES=tiling.stages, **self._update_constants, **self._constants,
            **self._scaling_constants,
        )  # fmt: skip

    @property
    def _update_operands(self) -> tuple[Any, ...]:
        if self.update is None:
            return (None,) * 3
        return self.update.stack.b_NLR, self.update.low_MPR, self.update.places_M

    @property
    def _update_constants(self) -> dict[str, Any]:
        if self.update is None:
            return {"LR": 0, "R": 1, "P": 1, "FIRST": 0, "SECOND": 0, "BE": 16, "EARLY": False}
        stack, (first, second) = self.update.stack, self.update.part_starts
        LR = stack.b_NLR[0].numel()
        return {
            "LR": LR, "R": stack.max_rank, "P": stack.num_parts, "FIRST": first, "SECOND": second,
            "BE": 128 if LR > 64 else 64, "EARLY": self.update.reads_early and self.pdl,
        }  # fmt: skip

    @property
    def _residual(self) -> Residual:
        assert isinstance(self.out, ResidualSum)
        return self.out.residual_MN, self.out.gain_N, self.out.gained_MN, self.out.squares_MQ

    @property
    def _operands(self) -> tuple[Tensor | None, ...]:
        residual = self._residual if isinstance(self.out, ResidualSum) else (None,) * 4
        return self.result_MN, self.bias_N, self.squares_MQ, *residual

    @property
    def _scaling(self) -> tuple[Tensor | None, ...]:
        return self.scales_N, self.peaks_MA, self.out_peaks_MA

    @property
    def _constants(self) -> dict[str, Any]:
        Q, tiling = 1 if self.squares_MQ is None else self.squares_MQ.shape[1], self.tiling
        return {
            "N": self.result_MN.shape[1], "K": self.x_MK.shape[1], "Q": Q, "QP": triton.next_power_of_2(Q),
            "BN": tiling.block_n, "BK": tiling.block_k, "EPILOGUE": self.epilogue,
            "SCALED": self.squares_MQ is not None, "BIAS": self.bias_N is not None, "PDL": self.pdl,
            "num_warps": tiling.warps, "launch_pdl": self.pdl,
        }  # fmt: skip

    @property
    def _scaling_constants(self) -> dict[str, Any]:
        return {
            "A": PEAKS_PER_ROW, "QUANTIZED": self.scales_N is not None, "PEAKS": self.out_peaks_MA is not None
        }  # fmt: skip
