"""All layers of a step in one native call, where a rank has the whole model and every operation has a native kernel.

Made by the model at load with `native_layers`, which gives None where the layers are to be called one by one. Between
two kernels there is then no Python: a decode step of SmolLM2 spends 2 ms less, and leaves the interpreter to others.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.attention.torch_backend import AttentionPlan
from tensorweave.kernels.heads.reference import HeadNorms, WriteSlots
from tensorweave.kernels.linear.reference import Linear, PackedLinear
from tensorweave.kernels.native.library import NativeKernels, native_for
from tensorweave.kernels.weights import huge_pages

# T tokens, D hidden size, H head dim, I intermediate width; B blocks, P tokens a block, C = 2 K planes of a KV block

_BLOCK_ROWS = 448  # BLOCK_ROWS in layers.h


@dataclass(frozen=True, slots=True)
class LayerWeights:
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
    """Layers that are alike. Working memory grows to the largest step seen, and is kept. One caller at a time."""

    def __init__(self, native: NativeKernels, layers: Sequence[LayerWeights], head_dim: int, epsilon: float) -> None:
        self._native = native
        self._layers = tuple(layers)  # what the table points to
        self._head_dim = head_dim
        self._epsilon = epsilon
        self._windows = list(dict.fromkeys(layer.window for layer in layers))
        self._table = array("q")
        for layer in layers:
            norms = layer.head_norms
            heads = (0, 0) if norms is None else (norms.query_H.data_ptr(), norms.key_H.data_ptr())
            self._table.extend((layer.attention_norm_D.data_ptr(), *heads, layer.mlp_norm_D.data_ptr()))
            for linear in layer.linears:
                assert isinstance(linear, PackedLinear)
                self._table.extend(_matrix(linear, native.dtype))
            self._table.append(self._windows.index(layer.window))
        (self._X, self._D), (_, self._Q), _, (_, self._I) = (_shape(linear) for linear in layers[0].linears)
        self._scratch = torch.empty(0, dtype=native.dtype)
        self._partial = torch.empty(0)
        self._num_done = array("q", [0])

    @property
    def num_done(self) -> int:
        """Layers computed so far, in all calls together. Any thread may look, also during a call."""
        return self._num_done[0]

    def __call__(
        self,
        x_TD: Tensor,
        table_TH: Tensor,
        write: WriteSlots,
        plans: Mapping[int | None, AttentionPlan],
        caches: Sequence[Tensor],
    ) -> Tensor:
        """Changes x in place, and gives it: the hidden states after the last layer."""
        T, H = len(x_TD), self._head_dim
        _, C, P, _ = caches[0].shape
        native_plans = array("q")
        num_tasks, read_heads = 0, None
        for window in self._windows:
            plan = plans[window].native
            assert plan is not None, "a step without tokens"
            native_plans.extend((plan.tiles.data_ptr(), plan.blocks.data_ptr(), len(plan.tiles) // 5, plan.num_tasks))
            native_plans.append(plan.window)
            num_tasks, read_heads = max(num_tasks, plan.num_tasks), plan.read_heads
        assert read_heads is not None
        R = len(read_heads)
        G = self._Q // H // R
        self._reserve(T, num_tasks * G * (H + 2))
        sizes = array("q", (T, len(self._layers), R * G, C // 2, P, H, R, G))
        pointers = array("q", [cache.data_ptr() for cache in caches])
        self._native.run_layers(
            *(_address(numbers) for numbers in (sizes, self._table, pointers, native_plans)),
            read_heads.data_ptr(),
            table_TH.data_ptr(),
            write.slots_T.data_ptr(),
            x_TD.data_ptr(),
            self._scratch.data_ptr(),
            self._partial.data_ptr(),
            self._epsilon,
            H**-0.5,
            _address(self._num_done),
        )
        return x_TD

    def _reserve(self, T: int, num_partial: int) -> None:
        block = min(T, _BLOCK_ROWS)
        size = T * (self._X + self._Q + self._D) + block * (self._D + 3 * self._I + max(self._D, self._Q, self._I))
        if size > len(self._scratch):
            self._scratch = huge_pages((size,), self._scratch.dtype)
        if num_partial > len(self._partial):
            self._partial = torch.empty(num_partial)


def native_layers(layers: Sequence[LayerWeights], head_dim: int, epsilon: float) -> NativeLayers | None:
    """None where a linear is not packed, or the kernels do not take such heads or elements."""
    native = native_for(layers[0].attention_norm_D)
    if native is None or head_dim % (2 * native.vector_length):
        return None
    if not all(isinstance(linear, PackedLinear) for layer in layers for linear in layer.linears):
        return None
    is_alike = len({tuple(_shape(linear) for linear in layer.linears) for layer in layers}) == 1
    return NativeLayers(native, layers, head_dim, epsilon) if is_alike else None


def _shape(linear: Linear) -> tuple[int, int]:
    assert isinstance(linear, PackedLinear)
    return linear.num_outputs, linear.num_inputs


def _matrix(linear: PackedLinear, dtype: torch.dtype) -> tuple[int, ...]:
    bias = 0 if linear.bias_N is None else linear.bias_N.data_ptr()
    return linear.packed.data_ptr(), bias, *_shape(linear), int(linear.packed.dtype != dtype)


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]
