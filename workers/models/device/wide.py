"""`WideLayers`: all layers of a step of many tokens: products by cuBLAS, and fused kernels between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tensorweave.kernels.device_operations import DecodeAttention, DeviceOperations, PrefillPlan
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceLayer, DeviceModel

# T tokens, R rows, X = N + 2 K heads, N of them queries, H head dim, B blocks, C = 2 K planes of a block
# P tokens per block


class LayerAttention(Protocol):
    """Rotates a layer's new heads, stores keys and values, and attends."""

    def __call__(self, layer: DeviceLayer, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodeLayerAttention:
    """Of a step of decodes alone: one kernel."""

    attend: DecodeAttention

    def __call__(self, layer: DeviceLayer, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor) -> None:
        scale, rotation = heads_TXH.shape[2] ** -0.5, layer.rotation
        self.attend(heads_TXH, cache_BCPH, out_TNH, window=layer.window, scale=scale, rotation=rotation)


@dataclass(frozen=True, slots=True)
class MixedLayerAttention:
    """Of a step with prompt chunks, whose rows come first, and perhaps decodes from row `num_prompt_rows` on.

    Args:
        slots_T: int32 KV slots, block * P + offset.
        positions_T: int32.
    """

    operations: DeviceOperations
    slots_T: Tensor
    positions_T: Tensor
    prefill: PrefillPlan
    decode: DecodeAttention | None
    num_prompt_rows: int

    def __call__(self, layer: DeviceLayer, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor) -> None:
        scale, num_prompt = heads_TXH.shape[2] ** -0.5, self.num_prompt_rows
        self.operations.rope_store(heads_TXH, cache_BCPH, self.slots_T, self.positions_T, layer.rotation)
        self.prefill.attend(heads_TXH, cache_BCPH, out_TNH, window=layer.window, scale=scale)
        if self.decode is not None:
            q_RNH = heads_TXH[num_prompt:, : out_TNH.shape[1]]
            self.decode(q_RNH, cache_BCPH, out_TNH[num_prompt:], window=layer.window, scale=scale, rotation=None)


class WideLayers:
    """`num_layers_done` counts since the start; any thread may read it."""

    def __init__(self, model: DeviceModel, operations: DeviceOperations, buffers: StepBuffers) -> None:
        self._model = model
        self._operations = operations
        self._buffers = buffers
        self.num_layers_done = 0

    def __call__(self, num_tokens: int, attention: LayerAttention, caches: Sequence[Tensor]) -> Tensor:
        """From `tokens_T` of the buffers to the hidden states after the final norm, [T, D]."""
        buffers, operations, epsilon = self._buffers, self._operations, self._model.epsilon
        x, normed, update = (b[:num_tokens] for b in (buffers.x_TD, buffers.normed_TD, buffers.update_TD))
        heads, attended = buffers.heads_TXH[:num_tokens], buffers.attended_TNH[:num_tokens]
        flat_heads, flat_attended, gated = heads.flatten(1), attended.flatten(1), buffers.gated_TI[:num_tokens]
        operations.embed(buffers.tokens_T[:num_tokens], self._model.embedding_VD, x)
        added: Tensor | None = None
        for layer, cache_BCPH in zip(self._model.layers, caches, strict=True):
            operations.add_rms_norm(x, added, layer.norm_D, epsilon, normed)
            operations.product(normed, layer.qkv, flat_heads)
            attention(layer, heads, cache_BCPH, attended)
            operations.product(flat_attended, layer.output, update)
            operations.add_rms_norm(x, update, layer.mlp_norm_D, epsilon, normed)
            operations.gated_product(normed, layer.gate_up, gated)
            operations.product(gated, layer.down, update)
            added = update
            self.num_layers_done += 1
        operations.add_rms_norm(x, added, self._model.norm_D, epsilon, normed)
        return normed
