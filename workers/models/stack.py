"""`DecoderStack`: all decoder layers of a rank, from the embedded tokens to the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.native.layers import NativeLayers, native_layers
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.native_form import native_form

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
        return self._layers(x_TD, inputs.rope_tables, inputs.attention, caches, inputs.updates)


def make_stack(layers: Sequence[DecoderLayer], *, can_be_native: bool) -> DecoderStack:
    """`can_be_native`: attention is, and no layer is split over ranks, so that nothing is exchanged between two
    kernels."""
    native = None
    taken = [native_form(layer) for layer in layers] if can_be_native else []
    forms = {each[1] for each in taken if each is not None}
    if len(forms) == 1 and None not in taken:
        native = native_layers([each[0] for each in taken if each is not None], forms.pop())
    return TorchStack(layers) if native is None else NativeStack(native)
