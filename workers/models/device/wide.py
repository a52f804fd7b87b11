"""`WideLayers`: all layers of a step of many tokens: products by cuBLAS, and fused kernels between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.device_operations import DecodeAttention, DeviceOperations, PrefillPlan
from tensorweave.workers.models.device.buffers import LayerBuffers, StepBuffers
from tensorweave.workers.models.device.mlp import DeviceMixture, DeviceMlp, SharedMlp
from tensorweave.workers.models.device.model import DeviceLayer, DeviceModel
from tensorweave.workers.models.device.products import LayerProducts

# T tokens, R rows, X = N + 2 K heads, N of them queries, H head dim, B blocks, C = 2 K planes of a block
# P tokens per block


class LayerAttention(Protocol):
    """Rotates a layer's new heads, stores keys and values, and attends."""

    def __call__(self, layer: DeviceLayer, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodeLayerAttention:
    """The attention of a step of decodes alone: one kernel."""

    attend: DecodeAttention

    def __call__(
        self,
        layer: DeviceLayer,
        heads_TXH: Tensor,
        cache_BCPH: Tensor,
        out_TNH: Tensor,
        peaks_TA: Tensor | None = None,
    ) -> None:
        scale, rotation = layer.scale, layer.rotation
        self.attend(
            heads_TXH, cache_BCPH, out_TNH, window=layer.window, scale=scale, rotation=rotation, peaks_RA=peaks_TA
        )


@dataclass(frozen=True, slots=True)
class MixedLayerAttention:
    """The attention of a step whose first rows are decodes, perhaps none, and whose others are prompt chunks.

    Args:
        slots_T: int32 KV slots of the chunks' tokens, block * P + offset; -1: padding.
        positions_T: int32.
        after_store: called when a layer's keys and values were put into the cache.
    """

    operations: DeviceOperations
    slots_T: Tensor
    positions_T: Tensor
    prefill: PrefillPlan
    decode: DecodeAttention | None
    num_decodes: int
    after_store: Callable[[], None]

    def store(self, layer: DeviceLayer, heads_TXH: Tensor, cache_BCPH: Tensor) -> None:
        """Rotate the chunks' heads, and put keys and values into the cache. There may be no queries among the heads."""
        heads = heads_TXH[self.num_decodes :]
        self.operations.rope_store(heads, cache_BCPH, self.slots_T, self.positions_T, layer.rotation)
        self.after_store()

    def __call__(self, layer: DeviceLayer, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor) -> None:
        scale, first = layer.scale, self.num_decodes
        self.store(layer, heads_TXH, cache_BCPH)
        self.prefill.attend(heads_TXH[first:], cache_BCPH, out_TNH[first:], window=layer.window, scale=scale)
        if self.decode is not None:
            DecodeLayerAttention(self.decode)(layer, heads_TXH[:first], cache_BCPH, out_TNH[:first])


class AllLayers(Protocol):
    """`WideLayers`, which has the contracts, or `WideQuantizedLayers`."""

    def __call__(self, num_tokens: int, attention: LayerAttention, caches: Sequence[Tensor]) -> Tensor: ...

    def of_rows(
        self,
        num_tokens: int,
        attention: MixedLayerAttention,
        rows_R: Tensor,
        row_attention: DecodeLayerAttention | None,
        caches: Sequence[Tensor],
    ) -> Tensor: ...


class WideLayers:
    """Layers with weights in any form; `WideQuantizedLayers` is faster where it fits."""

    def __init__(
        self, model: DeviceModel, operations: DeviceOperations, buffers: StepBuffers, products: LayerProducts
    ) -> None:
        self._model = model
        self._operations = operations
        self._buffers = buffers
        self._products = products
        self._num_queries = model.num_heads * model.head_dim
        self._last_keys_and_values = model.layers[-1].qkv.outputs_from(self._num_queries)

    def __call__(self, num_tokens: int, attention: LayerAttention, caches: Sequence[Tensor]) -> Tensor:
        """From `tokens_T` of the buffers to the hidden states of all tokens after the final norm, [T, D]."""
        part = self._buffers.embed(self._model, num_tokens)
        for layer, cache_BCPH in zip(self._model.layers, caches, strict=True):
            self._run_layer(layer, part, attention, cache_BCPH)
        return self._norm_last(part)

    def of_rows(
        self,
        num_tokens: int,
        attention: MixedLayerAttention,
        rows_R: Tensor,
        row_attention: DecodeLayerAttention | None,
        caches: Sequence[Tensor],
    ) -> Tensor:
        """The same for the rows that sample, [R, D]: the last layer computes nothing for the other tokens but their
        keys and values.

        Args:
            rows_R: int32; which of the step's tokens sample.
            row_attention: of these rows, each the newest token of its sequence; None where there are none.
        """
        layers, operations, epsilon = self._model.layers, self._operations, self._model.epsilon
        part = self._buffers.embed(self._model, num_tokens)
        for layer, cache_BCPH in zip(layers[:-1], caches, strict=False):
            self._run_layer(layer, part, attention, cache_BCPH)
        last, cache_BCPH = layers[-1], caches[-1]
        operations.rms_norm(part.x_TD, last.norm_D, epsilon, part.normed_TD)
        kv_TCH = part.keys_and_values(cache_BCPH)
        self._products.keys_and_values(last, self._last_keys_and_values, part, kv_TCH.flatten(1))
        attention.store(last, kv_TCH, cache_BCPH)
        sampled = self._buffers.sampled.first(len(rows_R))
        if row_attention is not None:
            torch.index_select(part.x_TD, 0, rows_R, out=sampled.x_TD)
            self._products.choose_rows(part, rows_R, sampled)
            self._run_layer(last, sampled, row_attention, cache_BCPH)
        return self._norm_last(sampled)

    def _run_layer(self, layer: DeviceLayer, part: LayerBuffers, attention: LayerAttention, cache_BCPH: Tensor) -> None:
        operations, epsilon = self._operations, self._model.epsilon
        operations.rms_norm(part.x_TD, layer.norm_D, epsilon, part.normed_TD)
        self._products.heads(layer, part)
        attention(layer, part.heads_TXH, cache_BCPH, part.attended_TNH)
        self._products.add_attended(layer, part)
        operations.rms_norm(part.x_TD, layer.mlp_norm_D, epsilon, part.normed_TD)
        if isinstance(layer.mlp, DeviceMlp):
            self._products.add_mlp(layer, layer.mlp, part)
        else:
            self._add_mixture(layer.mlp, part)

    def _add_mixture(self, mlp: DeviceMixture, part: LayerBuffers) -> None:
        operations, x_TD, normed_TD = self._operations, part.x_TD, part.normed_TD
        logits_TE = normed_TD.new_empty(len(normed_TD), mlp.experts.num_experts)
        operations.product(normed_TD, mlp.router, logits_TE)
        operations.add_experts(normed_TD, logits_TE, mlp.experts, x_TD)
        for shared in mlp.shared:
            self._add_shared(shared, part)

    def _add_shared(self, shared: SharedMlp, part: LayerBuffers) -> None:
        operations, normed_TD, mlp = self._operations, part.normed_TD, shared.mlp
        gate_T1, update_TD = normed_TD.new_empty(len(normed_TD), 1), torch.empty_like(normed_TD)
        gated_TI = normed_TD.new_empty(len(normed_TD), mlp.gated_width)
        operations.product(normed_TD, shared.gate, gate_T1)
        operations.gated_product(normed_TD, mlp.gate_up, gated_TI)
        operations.product(gated_TI, mlp.down, update_TD)
        operations.add_gated(part.x_TD, gate_T1, update_TD)

    def _norm_last(self, part: LayerBuffers) -> Tensor:
        self._operations.rms_norm(part.x_TD, self._model.norm_D, self._model.epsilon, part.normed_TD)
        return part.normed_TD
