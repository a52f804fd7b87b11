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
from tensorweave.kernels.lora.native import NativeUpdates
from tensorweave.kernels.lora.reference import NO_UPDATES, Updates
from tensorweave.kernels.native.library import NativeKernels, load_native
from tensorweave.kernels.native.structures import DecoderLayer, Matrix, StackStep
from tensorweave.kernels.weights import FP8, huge_pages

# T tokens, D hidden size, H head dim, B blocks, P tokens per block, C = 2 K planes of a KV block
# R runs of query heads with a KV head each, G query heads per run


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one decoder layer is made of. `rope` is the place of its table among the step's."""

    attention_norm_D: Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    down: Linear
    window: int | None
    rope: int = 0
    after_attention_D: Tensor | None = None
    after_mlp_D: Tensor | None = None
    sinks_N: Tensor | None = None
    sites: tuple[int, int, int, int] = (0, 0, 0, 0)
    """The numbers by which adapters know these linears."""

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class LayerForm:
    """What is alike in all layers. `norm_offset` is added to the weights of all norms, `update_factor` multiplies what
    attention and MLP add to the stream; for the rest see the operations' references."""

    head_dim: int
    epsilon: float
    scale: float
    norm_offset: float = 0.0
    soft_cap: float | None = None
    update_factor: float = 1.0
    is_gelu: bool = False
    has_neighbours: bool = False


class NativeLayers:
    """Layers whose matrices are alike. Working memory grows to the largest step seen, and is kept. One caller at a
    time."""

    def __init__(self, native: NativeKernels, layers: Sequence[LayerParts], form: LayerForm) -> None:
        self._native = native
        self._parts = tuple(layers)  # what the structures point to
        self._window_order = tuple(dict.fromkeys(part.window for part in layers))
        self._layers = (DecoderLayer * len(layers))(*(self._layer(part) for part in layers))
        self._num_done = ctypes.c_int64(0)
        self._step = StackStep(
            num_layers=len(layers),
            head_dim=form.head_dim,
            epsilon=form.epsilon,
            norm_offset=form.norm_offset,
            scale=form.scale,
            cap=form.soft_cap or 0.0,
            update_factor=form.update_factor,
            is_gelu=form.is_gelu,
            has_neighbours=form.has_neighbours,
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
            after_attention=_pointer(part.after_attention_D),
            after_mlp=_pointer(part.after_mlp_D),
            sinks=_pointer(part.sinks_N),
            qkv=_matrix(part.qkv),
            output=_matrix(part.output),
            gate_up=_matrix(part.gate_up),
            down=_matrix(part.down),
            window=self._window_order.index(part.window),
            rope=part.rope,
            **dict(zip(("qkv_site", "output_site", "gate_up_site", "down_site"), part.sites, strict=True)),
        )

    @property
    def num_done(self) -> int:
        """Layers computed so far, in all calls together. Any thread may read it, also during a call."""
        return self._num_done.value

    def __call__(
        self,
        x_TD: Tensor,
        rope_tables: Sequence[Tensor],
        plan: NativeAttentionPlan,
        caches: Sequence[Tensor],
        updates: Updates = NO_UPDATES,
    ) -> Tensor:
        """Change x in place into the hidden states after the last layer, and return it. `updates` are native ones."""
        T, (_, C, P, H) = len(x_TD), caches[0].shape
        query_heads, R = self._layers[0].output.num_inputs // H, len(plan.read_heads_R)
        self._reserve(T, plan.num_tasks * (query_heads // R) * (H + 2))
        pointers, windows = array("q", [cache.data_ptr() for cache in caches]), plan.in_order(self._window_order)
        tables = array("q", [table.data_ptr() for table in rope_tables])
        step = self._step
        step.query_heads, step.kv_heads, step.block_tokens = query_heads, C // 2, P
        step.num_read_heads, step.group, step.read_heads = R, query_heads // R, plan.read_heads_R.data_ptr()
        step.caches, step.windows = pointers.buffer_info()[0], ctypes.addressof(windows)
        step.num_tokens, step.x = T, x_TD.data_ptr()
        step.rope_tables, step.turned = tables.buffer_info()[0], rope_tables[0].shape[1]
        step.slots, step.is_fp8 = plan.slots.slots_T.data_ptr(), caches[0].dtype == FP8
        step.scratch, step.partial = self._scratch.data_ptr(), self._partial.data_ptr()
        step.updates = updates.blocks(self._native.most_rows_at_once) if isinstance(updates, NativeUpdates) else None
        self._native.run_layers(ctypes.addressof(step), ctypes.addressof(self._layers))
        return x_TD

    def _reserve(self, num_tokens: int, num_partial: int) -> None:
        size = self._native.layers_scratch(ctypes.addressof(self._layers), len(self._layers), num_tokens)
        if size > len(self._scratch):
            self._scratch = huge_pages((size,), self._scratch.dtype)
        if num_partial > len(self._partial):
            self._partial = torch.empty(num_partial)


def native_layers(layers: Sequence[LayerParts], form: LayerForm) -> NativeLayers | None:
    """None where a linear is not packed, or the kernels do not take such heads or elements."""
    weight_D = layers[0].attention_norm_D
    native = load_native(weight_D.dtype) if weight_D.device.type == "cpu" else None
    if native is None or not NativePlaceHeads.fits(native, form.head_dim):
        return None
    if not all(isinstance(linear, PackedLinear | PackedGroupedLinear) for layer in layers for linear in layer.linears):
        return None
    is_alike = len({tuple(_shape(linear) for linear in layer.linears) for layer in layers}) == 1
    return NativeLayers(native, layers, form) if is_alike else None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(linear: Linear) -> Matrix:
    assert isinstance(linear, PackedLinear | PackedGroupedLinear)
    return linear.matrix


def _shape(linear: Linear) -> tuple[int, int]:
    matrix = _matrix(linear)
    return matrix.num_outputs, matrix.num_inputs
