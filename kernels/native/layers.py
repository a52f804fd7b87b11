"""All decoder layers of a step in one native call. Made at load by the model, through `native_layers`.

There is no Python between two kernels: a decode step of SmolLM2 takes 2 ms less, and other threads get the interpreter.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.heads.native import NativePlaceHeads
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.linear.grouped import PackedGroupedLinear
from tensorweave.kernels.linear.native import PackedLinear
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.native.library import NativeKernels, load_native
from tensorweave.kernels.native.structures import DecoderLayer, Matrix, StackStep
from tensorweave.kernels.weights import huge_pages

# T tokens, D hidden size, H head dim, B blocks, P tokens per block, C = 2 K planes of a KV block
# R runs of query heads with a KV head each, G query heads per run


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one decoder layer is made of."""

    attention_norm_D: Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    down: Linear
    window: int | None

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.output, self.gate_up, self.down


class NativeLayers:
    """Layers whose matrices are alike. Working memory grows to the largest step seen, and is kept. One caller at a
    time."""

    def __init__(self, native: NativeKernels, layers: Sequence[LayerParts], head_dim: int, epsilon: float) -> None:
        self._native = native
        self._parts = tuple(layers)  # what the structures point to
        self._window_order = tuple(dict.fromkeys(part.window for part in layers))
        self._layers = (DecoderLayer * len(layers))(*(self._layer(part) for part in layers))
        self._num_done = ctypes.c_int64(0)
        self._step = StackStep(
            num_layers=len(layers),
            head_dim=head_dim,
            epsilon=epsilon,
            scale=head_dim**-0.5,
            num_done=ctypes.addressof(self._num_done),
        )
        self._scratch = torch.empty(0, dtype=native.dtype)
        self._partial = torch.empty(0)

    def _layer(self, part: LayerParts) -> DecoderLayer:
        norms = part.head_norms
        return DecoderLayer(
            attention_norm=part.attention_norm_D.data_ptr(),
            query_norm=None if norms is None else norms.query_H.data_ptr(),
            key_norm=None if norms is None else norms.key_H.data_ptr(),
            mlp_norm=part.mlp_norm_D.data_ptr(),
            qkv=_matrix(part.qkv),
            output=_matrix(part.output),
            gate_up=_matrix(part.gate_up),
            down=_matrix(part.down),
            window=self._window_order.index(part.window),
        )

    @property
    def num_done(self) -> int:
        """Layers computed so far, in all calls together. Any thread may read it, also during a call."""
        return self._num_done.value

    def __call__(
        self, x_TD: Tensor, rope_table_TH: Tensor, plan: NativeAttentionPlan, caches: Sequence[Tensor]
    ) -> Tensor:
        """Change x in place into the hidden states after the last layer, and return it."""
        T, H = len(x_TD), rope_table_TH.shape[1]
        _, C, P, _ = caches[0].shape
        query_heads, R = self._layers[0].output.num_inputs // H, len(plan.read_heads_R)
        self._reserve(T, plan.num_tasks * (query_heads // R) * (H + 2))
        pointers, windows = array("q", [cache.data_ptr() for cache in caches]), plan.in_order(self._window_order)
        step = self._step
        step.query_heads, step.kv_heads, step.block_tokens = query_heads, C // 2, P
        step.num_read_heads, step.group, step.read_heads = R, query_heads // R, plan.read_heads_R.data_ptr()
        step.caches, step.windows = pointers.buffer_info()[0], ctypes.addressof(windows)
        step.num_tokens, step.x = T, x_TD.data_ptr()
        step.rope_table, step.slots = rope_table_TH.data_ptr(), plan.slots.slots_T.data_ptr()
        step.scratch, step.partial = self._scratch.data_ptr(), self._partial.data_ptr()
        self._native.run_layers(ctypes.addressof(step), ctypes.addressof(self._layers))
        return x_TD

    def _reserve(self, num_tokens: int, num_partial: int) -> None:
        size = self._native.layers_scratch(ctypes.addressof(self._layers), len(self._layers), num_tokens)
        if size > len(self._scratch):
            self._scratch = huge_pages((size,), self._scratch.dtype)
        if num_partial > len(self._partial):
            self._partial = torch.empty(num_partial)


def native_layers(layers: Sequence[LayerParts], head_dim: int, epsilon: float) -> NativeLayers | None:
    """None where a linear is not packed, or the kernels do not take such heads or elements."""
    weight_D = layers[0].attention_norm_D
    native = load_native(weight_D.dtype) if weight_D.device.type == "cpu" else None
    if native is None or not NativePlaceHeads.fits(native, head_dim):
        return None
    if not all(isinstance(linear, PackedLinear | PackedGroupedLinear) for layer in layers for linear in layer.linears):
        return None
    is_alike = len({tuple(_shape(linear) for linear in layer.linears) for layer in layers}) == 1
    return NativeLayers(native, layers, head_dim, epsilon) if is_alike else None


def _matrix(linear: Linear) -> Matrix:
    assert isinstance(linear, PackedLinear | PackedGroupedLinear)
    return linear.matrix


def _shape(linear: Linear) -> tuple[int, int]:
    matrix = _matrix(linear)
    return matrix.num_outputs, matrix.num_inputs
