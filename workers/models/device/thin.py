"""`ThinLayers`: all layers of a decode step of few rows: five kernels a layer, with experts seven
to nine, with adapters nine, with the norms folded into the products.

See `kernels.linear.triton_thin`; only on a GPU, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import can_run_hopper_kernels
from tensorweave.kernels.linear import cuda_grouped
from tensorweave.kernels.linear.thin_tiling import PLAIN, RESIDUAL
from tensorweave.kernels.linear.triton_quantize import make_peaks
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.lora.update import LowRankUpdate, can_update
from tensorweave.kernels.norm.triton import embed
from tensorweave.kernels.weights import Matrix, PackedCodes, QuantizedWeight
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.models.device.thin_mlp import (
    LayerPeaks,
    ThinTilings,
    fits_thin_mlp,
    is_quantized,
    make_thin_mlp,
)
from tensorweave.workers.models.device.thin_updates import NO_SITES, NO_THIN_UPDATES, ThinUpdates
from tensorweave.workers.models.device.wide import DecodeLayerAttention

MAX_THIN_ROWS: Final = 128
MAX_QUANTIZED_THIN_ROWS: Final = 64
"""Beyond, `WideQuantizedLayers` is faster: rows are quantized once, not by each block of a product."""
_MAX_SPLITS: Final = 2


class ThinLayers:
    """The step of a fixed number of rows. `workspace` is shared by all sizes, see `make_workspace`."""

    def __init__(
        self,
        model: DeviceModel,
        buffers: StepBuffers,
        workspace: SplitWorkspace,
        num_rows: int,
        updates: ThinUpdates = NO_THIN_UPDATES,
    ) -> None:
        self._model = model
        self._buffers = buffers
        self._workspace = workspace
        self._num_rows = num_rows
        self._updates = updates
        D, device, output = model.hidden_size, model.device, model.layers[0].output
        self._tilings = ThinTilings(num_rows, can_run_hopper_kernels(device), updates.are_some)
        self._output_tiling = self._tilings.choose(output, D, RESIDUAL)
        self._mlp = make_thin_mlp(model, buffers, workspace, self._tilings, updates)
        self._squares = torch.zeros(num_rows, self._mlp.num_squares, device=device)
        self._mlp_squares = torch.zeros(num_rows, self._output_tiling.num_squares(D), device=device)
        self._all_peaks = make_peaks(len(model.layers), 4, num_rows, device=device) if is_quantized(output) else None
        self._peaks = [
            LayerPeaks() if self._all_peaks is None else LayerPeaks(*self._all_peaks[i])
            for i in range(len(model.layers))
        ]

    @staticmethod
    def fits(model: DeviceModel, stacks: Sequence[SiteStack] = ()) -> bool:
        """Whether the kernels are for this model, the adapters of its sites and this device: they need the dependent
        launches of Hopper."""
        if (
            model.has_norms_behind
            or model.device.type != "cuda"
            or torch.cuda.get_device_capability(model.device) < (9, 0)
        ):
            return False
        matrices = [matrix for layer in model.layers for matrix in layer.matrices]
        if stacks and not _can_update(model, matrices, stacks):
            return False
        is_alike = len({type(matrix.weight_NK) for matrix in matrices}) == 1
        biased = any(
            matrix.bias_N is not None for layer in model.layers for matrix in (layer.output, *layer.mlp.matrices)
        )
        is_even = model.hidden_size % 64 == 0 and all(matrix.num_inputs % 64 == 0 for matrix in matrices)
        can_be_packed = all(cuda_grouped.fits(m.weight_NK) for m in matrices if isinstance(m.weight_NK, PackedCodes))
        is_16_bit = model.dtype == torch.bfloat16
        return is_alike and is_even and not biased and is_16_bit and can_be_packed and fits_thin_mlp(model)

    @staticmethod
    def max_rows(model: DeviceModel) -> int:
        match model.layers[0].output.weight_NK:
            case QuantizedWeight():
                return MAX_QUANTIZED_THIN_ROWS
            case PackedCodes():
                return cuda_grouped.MAX_GROUPED_ROWS
            case _:
                return MAX_THIN_ROWS

    @staticmethod
    def make_workspace(model: DeviceModel) -> SplitWorkspace:
        most = max(model.hidden_size, model.layers[0].qkv.num_outputs)
        return SplitWorkspace.create(most, MAX_THIN_ROWS, _MAX_SPLITS, model.device)

    def __call__(self, attention: DecodeLayerAttention, caches: Sequence[Tensor]) -> None:
        """From `tokens_T` of the buffers to `logits_RV`."""
        model, rows, buffers = self._model, self._num_rows, self._buffers
        part = buffers.all.first(rows)
        x, gained, heads, attended = part.x_TD, part.normed_TD, part.heads_TXH, part.attended_TNH
        layers, after_last = model.layers, LayerPeaks()
        if self._all_peaks is not None:
            self._all_peaks.zero_()
        embed(
            buffers.tokens_T[:rows], model.embedding_VD, layers[0].norm_D, x, gained, self._squares,
            peaks_TA=self._peaks[0].qkv, pdl=True,
        )  # fmt: skip
        for i, (layer, cache_BCPH) in enumerate(zip(layers, caches, strict=True)):
            after_D = layers[i + 1].norm_D if i + 1 < len(layers) else model.norm_D
            peaks, next_peaks = self._peaks[i], self._peaks[i + 1] if i + 1 < len(layers) else after_last
            sites = layer.sites or NO_SITES
            self._product(gained, layer.qkv, heads.flatten(1), peaks.qkv, self._updates.start(sites.qkv, gained))
            attention(layer, heads, cache_BCPH, attended, peaks.output)
            middle = ResidualSum(x, layer.mlp_norm_D, gained, self._mlp_squares)
            thin_linear(
                attended.flatten(1), layer.output.weight_NK, middle, peaks_MA=peaks.output, out_peaks_MA=peaks.gate_up,
                update=self._updates.start(sites.output, attended.flatten(1)), tiling=self._output_tiling,
                workspace=self._workspace, pdl=True,
            )  # fmt: skip
            last = ResidualSum(x, after_D, gained, self._squares)
            self._mlp(layer.mlp, sites, gained, self._mlp_squares, last, peaks, next_peaks)
        self._product(gained, model.head, buffers.logits_RV[:rows], None, None)

    def _product(
        self,
        gained_RD: Tensor,
        matrix: Matrix,
        out_RO: Tensor,
        peaks_RA: Tensor | None,
        update: LowRankUpdate | None,
    ) -> None:
        thin_linear(
            gained_RD, matrix.weight_NK, out_RO, bias_N=matrix.bias_N, squares_MQ=self._squares,
            epsilon=self._model.epsilon, peaks_MA=peaks_RA, update=update,
            tiling=self._tilings.choose(matrix, out_RO.shape[1], PLAIN), workspace=self._workspace, pdl=True,
        )  # fmt: skip


def _can_update(model: DeviceModel, matrices: Sequence[Matrix], stacks: Sequence[SiteStack]) -> bool:
    is_plain = all(isinstance(matrix.weight_NK, Tensor) for matrix in matrices)
    return is_plain and can_run_hopper_kernels(model.device) and all(can_update(stack) for stack in stacks)
