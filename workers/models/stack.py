"""`DecoderStack`: all decoder layers of a rank, from the embedded tokens to the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tensorweave.kernels.activation.native import NativeSiluMul
from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.native.layers import LayerParts, NativeLayers, native_layers
from tensorweave.workers.models.decoder_layer import DecoderLayer, GatedMlp
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.layers import RmsNorm
from tensorweave.workers.models.residual import Unchanged

# T tokens, D hidden size, B blocks, P tokens per block, C = 2 K planes of a KV block, H head dim


class DecoderStack(Protocol):
    """Keys and values go into `caches`, one [B, C, P, H] per layer. One caller at a time.

    On a GPU, `models.device` runs the layers instead.
    """

    @property
    def num_layers_done(self) -> int:
        """Since the start. Any thread may read it, also during a call."""
        ...

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs, caches: Sequence[Tensor]) -> Tensor:
        """Change x in place into the hidden states after the last layer, and return it."""
        ...


class TorchStack:
    """Calls the layers one by one."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = tuple(layers)
        self.num_layers_done = 0

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs, caches: Sequence[Tensor]) -> Tensor:
        update_TD = None
        for layer, cache_BCPH in zip(self.layers, caches, strict=True):
            update_TD = layer(x_TD, update_TD, inputs, cache_BCPH)
            self.num_layers_done += 1
        assert update_TD is not None, "a model without layers"
        x_TD += update_TD
        return x_TD


class NativeStack:
    """Calls the native kernels of all layers at once; the results have the bits of `TorchStack` with those kernels."""

    def __init__(self, layers: NativeLayers) -> None:
        self._layers = layers

    @property
    def num_layers_done(self) -> int:
        return self._layers.num_done

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs, caches: Sequence[Tensor]) -> Tensor:
        assert isinstance(inputs.attention, NativeAttentionPlan)
        return self._layers(x_TD, inputs.rope_table_TH, inputs.attention, caches)


def make_stack(layers: Sequence[DecoderLayer], *, has_whole_layers: bool) -> DecoderStack:
    """`has_whole_layers`: no layer is split over ranks, so that nothing is exchanged between two kernels."""
    native = None
    parts = [part for layer in layers if (part := _native_parts(layer)) is not None]
    if has_whole_layers and len(parts) == len(layers):
        native = native_layers(parts, layers[0].attention.head_dim, _epsilon(layers[0]))
    return TorchStack(layers) if native is None else NativeStack(native)


def _native_parts(layer: DecoderLayer) -> LayerParts | None:
    """None for a layer of a form that `NativeLayers` does not compute."""
    attention, mlp, before_attention, before_mlp = layer.attention, layer.mlp, layer.attention_norm, layer.mlp_norm
    if not isinstance(before_attention, RmsNorm) or not isinstance(before_mlp, RmsNorm):
        return None
    if not isinstance(mlp, GatedMlp) or not isinstance(mlp.activate, NativeSiluMul):
        return None
    if not isinstance(layer.after_attention, Unchanged) or not isinstance(layer.after_mlp, Unchanged):
        return None
    return LayerParts(
        attention_norm_D=before_attention.weight_D,
        qkv=attention.qkv.linear,
        head_norms=attention.norms,
        output=attention.output.linear,
        mlp_norm_D=before_mlp.weight_D,
        gate_up=mlp.gate_up.linear,
        down=mlp.down.linear,
        window=attention.window,
    )


def _epsilon(layer: DecoderLayer) -> float:
    assert isinstance(layer.mlp_norm, RmsNorm)
    return layer.mlp_norm.epsilon
