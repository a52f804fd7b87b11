"""`WideQuantizedLayers`: all layers of a step of many tokens with 8-bit weights, on a GPU.

What makes a product's input writes it in 8 bits, and what reads an output scales it; see `kernels.linear.quantized`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.linear.quantized import (
    QuantizedRows,
    UnscaledProduct,
    can_scale,
    scaled_linear,
    unscaled_linear,
)
from tensorweave.kernels.linear.triton_quantize import quantize
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs
from tensorweave.kernels.norm.triton import add_rms_norm
from tensorweave.kernels.weights import Matrix, QuantizedWeight
from tensorweave.workers.models.device.buffers import LayerBuffers, StepBuffers
from tensorweave.workers.models.device.mlp import DeviceMlp
from tensorweave.workers.models.device.model import DeviceLayer, DeviceModel
from tensorweave.workers.models.device.wide import DecodeLayerAttention, LayerAttention, MixedLayerAttention

_SCALED_ROWS: Final = 1024
"""From here on the widest product is not slower with scales: 2,048 rows 324 rather than 375 µs (H100, 2026-11-27)."""

# T tokens, X = N + 2 K heads, N of them queries, H head dim, D hidden size, I intermediate width


@dataclass(frozen=True, slots=True)
class EightBitRows:
    """What products read, for some number of tokens, and what the products behind the residual leave the next norm."""

    normed: QuantizedRows
    attended: QuantizedRows
    gated: QuantizedRows
    gate_up_T2I: Tensor
    update_TD: Tensor

    @classmethod
    def empty(cls, model: DeviceModel, num_tokens: int) -> EightBitRows:
        device, D, I = model.device, model.hidden_size, model.intermediate_size  # noqa: E741
        return cls(
            normed=QuantizedRows.empty(num_tokens, D, device),
            attended=QuantizedRows.empty(num_tokens, model.num_heads * model.head_dim, device),
            gated=QuantizedRows.empty(num_tokens, I, device),
            gate_up_T2I=torch.empty(num_tokens, 2 * I, dtype=model.dtype, device=device),
            update_TD=torch.empty(num_tokens, D, dtype=model.dtype, device=device),
        )


class WideQuantizedLayers:
    """The counterpart of `WideLayers`, which has the contracts."""

    def __init__(self, model: DeviceModel, buffers: StepBuffers) -> None:
        self._model = model
        self._buffers = buffers
        self._ones = torch.ones((), device=model.device)
        self._has_pdl = torch.cuda.get_device_capability(model.device) >= (9, 0)
        self._last_keys_and_values = model.layers[-1].qkv.outputs_from(model.num_heads * model.head_dim)

    @staticmethod
    def fits(model: DeviceModel) -> bool:
        if model.has_norms_behind or len(model.plain_mlps) < len(model.layers):
            return False
        matrices = [matrix.weight_NK for layer in model.layers for matrix in layer.matrices]
        is_quantized = all(isinstance(weight, QuantizedWeight) and can_scale(weight) for weight in matrices)
        biased = any(m.bias_N is not None for layer in model.layers for m in (layer.output, *layer.mlp.matrices))
        return is_quantized and not biased and model.device.type == "cuda"

    def __call__(self, num_tokens: int, attention: LayerAttention, caches: Sequence[Tensor]) -> Tensor:
        model = self._model
        part, rows, update = self._buffers.embed(model, num_tokens), EightBitRows.empty(model, num_tokens), None
        for layer, cache_BCPH in zip(model.layers, caches, strict=True):
            update = self._run_layer(layer, part, rows, attention, cache_BCPH, update)
        return self._norm_last(part, update)

    def of_rows(
        self,
        num_tokens: int,
        attention: MixedLayerAttention,
        rows_R: Tensor,
        row_attention: DecodeLayerAttention | None,
        caches: Sequence[Tensor],
    ) -> Tensor:
        model = self._model
        part, rows, update = self._buffers.embed(model, num_tokens), EightBitRows.empty(model, num_tokens), None
        for layer, cache_BCPH in zip(model.layers[:-1], caches, strict=False):
            update = self._run_layer(layer, part, rows, attention, cache_BCPH, update)
        last, cache_BCPH = model.layers[-1], caches[-1]
        add_rms_norm(part.x_TD, update, last.norm_D, model.epsilon, rows.normed, pdl=self._has_pdl)
        kv_TCH = part.keys_and_values(cache_BCPH)
        keys_and_values = self._last_keys_and_values
        scaled_linear(rows.normed, _weight(keys_and_values), kv_TCH.flatten(1), keys_and_values.bias_N)
        attention.store(last, kv_TCH, cache_BCPH)
        sampled, update = self._buffers.sampled.first(len(rows_R)), None
        if row_attention is not None:
            torch.index_select(part.x_TD, 0, rows_R, out=sampled.x_TD)
            few = EightBitRows.empty(model, len(rows_R))
            update = self._run_layer(last, sampled, few, row_attention, cache_BCPH, None)
        return self._norm_last(sampled, update)

    def _run_layer(
        self,
        layer: DeviceLayer,
        part: LayerBuffers,
        rows: EightBitRows,
        attention: LayerAttention,
        cache_BCPH: Tensor,
        update: UnscaledProduct | None,
    ) -> UnscaledProduct:
        """`update` belongs to the residual, as does what is returned: the next norm adds it."""
        epsilon, pdl, attended = self._model.epsilon, self._has_pdl, part.attended_TNH.flatten(1)
        add_rms_norm(part.x_TD, update, layer.norm_D, epsilon, rows.normed, pdl=pdl)
        scaled_linear(rows.normed, _weight(layer.qkv), part.heads_TXH.flatten(1), layer.qkv.bias_N)
        attention(layer, part.heads_TXH, cache_BCPH, part.attended_TNH)
        quantize(attended, rows.attended, pdl=pdl)
        attended_update = unscaled_linear(rows.attended, _weight(layer.output), self._ones, rows.update_TD)
        add_rms_norm(part.x_TD, attended_update, layer.mlp_norm_D, epsilon, rows.normed, pdl=pdl)
        assert isinstance(layer.mlp, DeviceMlp)
        gate_up: Tensor | UnscaledProduct
        if len(attended) >= _SCALED_ROWS:
            gate_up = scaled_linear(rows.normed, _weight(layer.mlp.gate_up), rows.gate_up_T2I)
        else:
            gate_up = unscaled_linear(rows.normed, _weight(layer.mlp.gate_up), self._ones, rows.gate_up_T2I)
        silu_mul_pairs(gate_up, rows.gated, pdl=pdl)
        return unscaled_linear(rows.gated, _weight(layer.mlp.down), self._ones, rows.update_TD)

    def _norm_last(self, part: LayerBuffers, update: UnscaledProduct | None) -> Tensor:
        model = self._model
        add_rms_norm(part.x_TD, update, model.norm_D, model.epsilon, part.normed_TD, pdl=self._has_pdl)
        return part.normed_TD


def _weight(matrix: Matrix) -> QuantizedWeight:
    assert isinstance(matrix.weight_NK, QuantizedWeight)
    return matrix.weight_NK
