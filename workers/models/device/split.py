"""`SplitLayers`: all layers of a step of a model that is split over ranks.

A rank has some of the heads, columns and tokens. What its share of the output product adds to the residual, and its
share of the down product, the ranks sum (`kernels.ranks`), in the kernel that also computes the next norm:

    embedding ─▶ sum, norm ─▶ qkv ─▶ attention ─▶ output ─▶ sum, norm ─▶ gate and up ─▶ down ─▶ sum, norm ─▶ …
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorweave.kernels.device_operations import DeviceOperations
from tensorweave.kernels.ranks.sums import RankSums
from tensorweave.workers.models.device.buffers import LayerBuffers, StepBuffers
from tensorweave.workers.models.device.mlp import DeviceMlp
from tensorweave.workers.models.device.model import DeviceLayer, DeviceModel
from tensorweave.workers.models.device.wide import DecodeLayerAttention, LayerAttention, MixedLayerAttention

# T tokens, R rows, D hidden size, H head dim, C = 2 K planes of a block


class SplitLayers:
    """Layers of any number of tokens: see `WideLayers`, which has the contracts."""

    def __init__(self, model: DeviceModel, operations: DeviceOperations, sums: RankSums, buffers: StepBuffers) -> None:
        self._model = model
        self._operations = operations
        self._sums = sums
        self._buffers = buffers
        self._last_keys_and_values = model.layers[-1].qkv.outputs_from(model.num_heads * model.head_dim)
        self._gains = (*(layer.norm_D for layer in model.layers), model.norm_D)

    def __call__(self, num_tokens: int, attention: LayerAttention, caches: Sequence[Tensor]) -> Tensor:
        part = self._run_first(num_tokens, len(caches), attention, caches, is_whole=False)
        return part.normed_TD

    def of_rows(
        self,
        num_tokens: int,
        attention: MixedLayerAttention,
        rows_R: Tensor,
        row_attention: DecodeLayerAttention | None,
        caches: Sequence[Tensor],
    ) -> Tensor:
        last, cache_BCPH = self._model.layers[-1], caches[-1]
        part = self._run_first(num_tokens, len(caches) - 1, attention, caches, is_whole=True)
        kv_TCH = part.keys_and_values(cache_BCPH)
        self._operations.product(part.normed_TD, self._last_keys_and_values, kv_TCH.flatten(1))
        attention.store(last, kv_TCH, cache_BCPH)
        sampled = self._buffers.sampled.first(len(rows_R))
        if row_attention is not None:
            torch.index_select(part.x_TD, 0, rows_R, out=sampled.x_TD)
            torch.index_select(part.normed_TD, 0, rows_R, out=sampled.normed_TD)
            self._run_layer(last, self._gains[-1], sampled, row_attention, cache_BCPH, is_whole=False)
        return sampled.normed_TD

    def _run_first(
        self, num_tokens: int, num_layers: int, attention: LayerAttention, caches: Sequence[Tensor], *, is_whole: bool
    ) -> LayerBuffers:
        """From `tokens_T` of the buffers through some layers. `is_whole`: every rank needs the residual afterwards."""
        model, part = self._model, self._buffers.all.first(num_tokens)
        tokens_T, first = self._buffers.tokens_T[:num_tokens], model.vocabulary.first
        self._operations.embed_share(tokens_T, model.embedding_VD, first, part.part_TD)
        self._sum(part, self._gains[0], is_first=True, is_whole=is_whole and num_layers == 0)
        for i in range(num_layers):
            is_last = i == num_layers - 1
            layer, gain_D = model.layers[i], self._gains[i + 1]
            self._run_layer(layer, gain_D, part, attention, caches[i], is_whole=is_whole and is_last)
        return part

    def _run_layer(
        self,
        layer: DeviceLayer,
        next_gain_D: Tensor,
        part: LayerBuffers,
        attention: LayerAttention,
        cache_BCPH: Tensor,
        *,
        is_whole: bool,
    ) -> None:
        operations = self._operations
        operations.product(part.normed_TD, layer.qkv, part.heads_TXH.flatten(1))
        attention(layer, part.heads_TXH, cache_BCPH, part.attended_TNH)
        operations.product(part.attended_TNH.flatten(1), layer.output, part.part_TD)
        self._sum(part, layer.mlp_norm_D, is_whole=False)
        assert isinstance(layer.mlp, DeviceMlp)
        operations.gated_product(part.normed_TD, layer.mlp.gate_up, part.gated_TI)
        operations.product(part.gated_TI, layer.mlp.down, part.part_TD)
        self._sum(part, next_gain_D, is_whole=is_whole)

    def _sum(self, part: LayerBuffers, gain_D: Tensor, *, is_whole: bool, is_first: bool = False) -> None:
        epsilon = self._model.epsilon
        self._sums.add_norm(
            part.part_TD, part.x_TD, gain_D, epsilon, part.normed_TD, is_first=is_first, is_whole=is_whole
        )
