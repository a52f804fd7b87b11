"""`ThinLayers`: all layers of a decode step of few rows: five kernels a layer, with the norms folded into the products.

See `kernels.linear.triton_thin`; only on a GPU, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, choose_tiling, thin_linear
from tensorweave.kernels.linear.triton_thin_kernels import GATED, PLAIN, RESIDUAL
from tensorweave.kernels.norm.triton import embed
from tensorweave.kernels.weights import Matrix
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.models.device.wide import DecodeLayerAttention

MAX_THIN_ROWS: Final = 128
_MAX_SPLITS: Final = 2


class ThinLayers:
    """The step of a fixed number of rows. `workspace` is shared by all sizes, see `make_workspace`."""

    def __init__(self, model: DeviceModel, buffers: StepBuffers, workspace: SplitWorkspace, num_rows: int) -> None:
        self._model = model
        self._buffers = buffers
        self._workspace = workspace
        self._num_rows = num_rows
        D, device = model.hidden_size, model.device
        output, down = model.layers[0].output, model.layers[0].down
        self._output_tiling = choose_tiling(num_rows, D, output.num_inputs, RESIDUAL)
        self._down_tiling = choose_tiling(num_rows, D, down.num_inputs, RESIDUAL)
        self._squares = torch.zeros(num_rows, self._down_tiling.num_squares(D), device=device)
        self._mlp_squares = torch.zeros(num_rows, self._output_tiling.num_squares(D), device=device)

    @staticmethod
    def fits(model: DeviceModel) -> bool:
        """Whether the kernels are for this model."""
        matrices = [matrix for layer in model.layers for matrix in layer.matrices]
        is_plain = all(isinstance(matrix.weight_NK, Tensor) for matrix in matrices)
        biased = any(
            matrix.bias_N is not None for layer in model.layers for matrix in (layer.output, layer.gate_up, layer.down)
        )
        is_even = model.hidden_size % 64 == 0 and all(matrix.num_inputs % 64 == 0 for matrix in matrices)
        return is_plain and is_even and not biased and model.dtype == torch.bfloat16 and model.device.type == "cuda"

    @staticmethod
    def make_workspace(model: DeviceModel) -> SplitWorkspace:
        most = max(model.hidden_size, model.layers[0].qkv.num_outputs)
        return SplitWorkspace.create(most, MAX_THIN_ROWS, _MAX_SPLITS, model.device)

    def __call__(self, attention: DecodeLayerAttention, caches: Sequence[Tensor]) -> None:
        """From `tokens_T` of the buffers to `logits_RV`."""
        model, rows, buffers, epsilon = self._model, self._num_rows, self._buffers, self._model.epsilon
        part = buffers.all.first(rows)
        x, gained, heads, attended, gated = part.x_TD, part.normed_TD, part.heads_TXH, part.attended_TNH, part.gated_TI
        layers = model.layers
        embed(buffers.tokens_T[:rows], model.embedding_VD, layers[0].norm_D, x, gained, self._squares, pdl=True)
        for i, (layer, cache_BCPH) in enumerate(zip(layers, caches, strict=True)):
            after_D = layers[i + 1].norm_D if i + 1 < len(layers) else model.norm_D
            self._product(gained, layer.qkv, heads.flatten(1))
            attention(layer, heads, cache_BCPH, attended)
            middle = ResidualSum(x, layer.mlp_norm_D, gained, self._mlp_squares)
            thin_linear(
                attended.flatten(1), _weight(layer.output), middle, tiling=self._output_tiling,
                workspace=self._workspace, pdl=True,
            )  # fmt: skip
            thin_linear(
                gained, _weight(layer.gate_up), gated, is_gated=True, squares_MQ=self._mlp_squares, epsilon=epsilon,
                tiling=choose_tiling(rows, gated.shape[1], x.shape[1], GATED), pdl=True,
            )  # fmt: skip
            last = ResidualSum(x, after_D, gained, self._squares)
            thin_linear(gated, _weight(layer.down), last, tiling=self._down_tiling, workspace=self._workspace, pdl=True)
        self._product(gained, Matrix(model.head_VD), buffers.logits_RV[:rows])

    def _product(self, gained_RD: Tensor, matrix: Matrix, out_RO: Tensor) -> None:
        tiling = choose_tiling(self._num_rows, out_RO.shape[1], gained_RD.shape[1], PLAIN)
        thin_linear(
            gained_RD, _weight(matrix), out_RO, bias_N=matrix.bias_N, squares_MQ=self._squares,
            epsilon=self._model.epsilon, tiling=tiling, workspace=self._workspace, pdl=True,
        )  # fmt: skip


def _weight(matrix: Matrix) -> Tensor:
    assert isinstance(matrix.weight_NK, Tensor)
    return matrix.weight_NK
