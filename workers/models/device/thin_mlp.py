"""`ThinMlp`: the second half of a layer of few rows, from the products that fold its norm to the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.linear.cuda_few import MAX_FEW_ROWS
from tensorweave.kernels.linear.thin_tiling import (
    FEW_TILING,
    GATED,
    PLAIN,
    RESIDUAL,
    Tiling,
    choose_quantized_tiling,
    choose_tiling,
)
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.mixture.triton import add_experts, choose_tilings, num_squares
from tensorweave.kernels.weights import Matrix, PackedCodes, QuantizedWeight
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.mlp import DeviceMixture, DeviceMlp
from tensorweave.workers.models.device.model import DeviceModel, LayerSites
from tensorweave.workers.models.device.thin_updates import ThinUpdates

# R rows, D hidden size, I intermediate width, E experts, Q sums of squares per row


@dataclass(frozen=True, slots=True)
class LayerPeaks:
    """Peaks [R, A] of what each product of a layer reads, if its weight is quantized: see `triton_quantize`."""

    qkv: Tensor | None = None
    output: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ThinTilings:
    """`is_adapted`: of products that adapters add to, which the kernel for one row has no form for."""

    num_rows: int
    has_few: bool
    is_adapted: bool = False

    def choose(self, matrix: Matrix, num_outputs: int, epilogue: int) -> Tiling:
        if isinstance(matrix.weight_NK, PackedCodes):
            return FEW_TILING
        if is_quantized(matrix):
            return choose_quantized_tiling(self.num_rows, num_outputs, matrix.num_inputs, epilogue)
        if self.is_adapted and self.num_rows <= MAX_FEW_ROWS:
            return FEW_TILING
        return choose_tiling(self.num_rows, num_outputs, matrix.num_inputs, epilogue, has_few=self.has_few)


class ThinMlp(Protocol):
    @property
    def num_squares(self) -> int:
        """Sums of squares per row that it leaves of the residual."""
        ...

    def __call__(
        self,
        mlp: DeviceMlp | DeviceMixture,
        sites: LayerSites,
        gained_RD: Tensor,
        squares_RQ: Tensor,
        out: ResidualSum,
        peaks: LayerPeaks,
        next_peaks: LayerPeaks,
    ) -> None:
        """Read `gained` and its squares, add to the residual of `out`, and leave there what the next layer reads."""
        ...


@dataclass(frozen=True, slots=True)
class ThinGatedMlp:
    epsilon: float
    gated_RI: Tensor
    tilings: ThinTilings
    down_tiling: Tiling
    hidden_size: int
    workspace: SplitWorkspace
    updates: ThinUpdates

    @property
    def num_squares(self) -> int:
        return self.down_tiling.num_squares(self.hidden_size)

    def __call__(
        self,
        mlp: DeviceMlp | DeviceMixture,
        sites: LayerSites,
        gained_RD: Tensor,
        squares_RQ: Tensor,
        out: ResidualSum,
        peaks: LayerPeaks,
        next_peaks: LayerPeaks,
    ) -> None:
        assert isinstance(mlp, DeviceMlp)
        thin_linear(
            gained_RD, mlp.gate_up.weight_NK, self.gated_RI, is_gated=True, squares_MQ=squares_RQ,
            epsilon=self.epsilon, peaks_MA=peaks.gate_up, out_peaks_MA=peaks.down,
            update=self.updates.start(sites.gate_up, gained_RD),
            tiling=self.tilings.choose(mlp.gate_up, self.gated_RI.shape[1], GATED), pdl=True,
        )  # fmt: skip
        thin_linear(
            self.gated_RI, mlp.down.weight_NK, out, peaks_MA=peaks.down, out_peaks_MA=next_peaks.qkv,
            update=self.updates.start(sites.down, self.gated_RI), tiling=self.down_tiling, workspace=self.workspace,
            pdl=True,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ThinMixture:
    epsilon: float
    logits_RE: Tensor
    tilings: ThinTilings
    num_squares: int

    def __call__(
        self,
        mlp: DeviceMlp | DeviceMixture,
        sites: LayerSites,
        gained_RD: Tensor,
        squares_RQ: Tensor,
        out: ResidualSum,
        peaks: LayerPeaks,
        next_peaks: LayerPeaks,
    ) -> None:
        assert isinstance(mlp, DeviceMixture)
        logits_RE = self.logits_RE
        thin_linear(
            gained_RD, mlp.router.weight_NK, logits_RE, squares_MQ=squares_RQ, epsilon=self.epsilon,
            tiling=self.tilings.choose(mlp.router, logits_RE.shape[1], PLAIN), pdl=True,
        )  # fmt: skip
        add_experts(
            gained_RD, logits_RE, mlp.experts, out, choose_tilings(len(gained_RD), mlp.experts, is_scaled=True),
            squares_TQ=squares_RQ, epsilon=self.epsilon, pdl=True,
        )  # fmt: skip


def fits_thin_mlp(model: DeviceModel) -> bool:
    """Whether all layers have MLPs of one form and shape, and no experts that all rows go through."""
    mlps = [layer.mlp for layer in model.layers]
    mixtures = [mlp for mlp in mlps if isinstance(mlp, DeviceMixture)]
    if not mixtures:
        return True
    shapes = {mlp.experts.down_EDI.shape for mlp in mixtures}
    return len(mixtures) == len(mlps) and len(shapes) == 1 and not any(mlp.shared for mlp in mixtures)


def make_thin_mlp(
    model: DeviceModel, buffers: StepBuffers, workspace: SplitWorkspace, tilings: ThinTilings, updates: ThinUpdates
) -> ThinMlp:
    first, D, num_rows = model.layers[0].mlp, model.hidden_size, tilings.num_rows
    if isinstance(first, DeviceMlp):
        gated_RI = buffers.all.first(num_rows).gated_TI
        down_tiling = tilings.choose(first.down, D, RESIDUAL)
        return ThinGatedMlp(model.epsilon, gated_RI, tilings, down_tiling, D, workspace, updates)
    logits_RE = torch.empty(num_rows, first.experts.num_experts, dtype=model.dtype, device=model.device)
    found = num_squares(D, choose_tilings(num_rows, first.experts, is_scaled=True))
    return ThinMixture(model.epsilon, logits_RE, tilings, found)


def is_quantized(matrix: Matrix) -> bool:
    return isinstance(matrix.weight_NK, QuantizedWeight)
