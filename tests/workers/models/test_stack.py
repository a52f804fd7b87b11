"""Both stacks of decoder layers: the same bits, and a count of layers that goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionShape, Span
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.operations import Operations, choose_operations
from tensorweave.kernels.quantize_integers import quantize_integers
from tensorweave.kernels.weights import Weight
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.decoder_layer import Attention, DecoderLayer, GatedMlp
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.layers import ColumnLinear, RmsNorm, RowLinear
from tensorweave.workers.models.stack import DecoderStack, NativeStack, TorchStack, make_stack

HIDDEN, WIDTH, HEADS, KV_HEADS, H, P, EPSILON = 32, 48, 4, 2, 64, 8, 1e-5
WINDOWS = (None, 5)
CPU = torch.device("cpu")


def make_layer(operations: Operations, window: int | None, bits: Literal[4, 8] | None = None) -> DecoderLayer:
    def linear(num_outputs: int, num_inputs: int) -> Linear:
        weight: Weight = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
        if bits is not None:
            weight = quantize_integers(weight, bits=bits, group_size=32, row_bits=16, has_minimums=bits == 4)
        return operations.make_linear(weight, None)

    def norm() -> RmsNorm:
        return RmsNorm(operations.add_rms_norm, torch.rand(HIDDEN), EPSILON)

    query, comm = HEADS * H, SoloComm()
    return DecoderLayer(
        norm(),
        Attention(
            ColumnLinear(linear(query + 2 * KV_HEADS * H, HIDDEN)),
            operations.place_heads,
            RowLinear(linear(HIDDEN, query), comm),
            None,
            H,
            window,
            H**-0.5,
        ),
        norm(),
        GatedMlp(ColumnLinear(linear(2 * WIDTH, HIDDEN)), operations.silu_mul, RowLinear(linear(HIDDEN, WIDTH), comm)),
    )


def run(stack: DecoderStack, operations: Operations, x: Tensor, caches: list[Tensor]) -> Tensor:
    """A prompt of seven tokens, and a decode."""
    spans = [Span(0, 7, 0, [3]), Span(7, 1, 9, [0, 2])]
    slots = torch.tensor([*range(3 * P, 3 * P + 7), 2 * P + 1])
    shape = AttentionShape(KV_HEADS, (0, 1), H, P, frozenset(WINDOWS))
    angles = torch.linspace(0, 3, 8 * H // 2).view(8, H // 2)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    inputs = ForwardInputs(torch.zeros(8), (table,), operations.make_attention(shape).plan(spans, slots))
    return stack(x.clone(), inputs, caches)


@pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")
@pytest.mark.parametrize("bits", [(None, None), (8, 8), (4, None)], ids=["plain", "integers", "mixed"])
def test_both_stacks_give_the_same_bits_and_count_their_layers(bits: tuple[Literal[4, 8] | None, ...]) -> None:
    torch.manual_seed(0)
    operations = choose_operations(CPU, torch.float32, H)
    layers = [make_layer(operations, *layer) for layer in zip(WINDOWS, bits, strict=True)]
    stacks = [make_stack(layers, can_be_native=is_whole) for is_whole in (True, False)]
    assert [type(stack) for stack in stacks] == [NativeStack, TorchStack]
    x, cache = torch.randn(8, HIDDEN), torch.randn(4, 2 * KV_HEADS, P, H)
    for steps in (1, 2):
        caches = [[cache.clone() for _ in layers] for _ in stacks]
        native, one_by_one = (run(stack, operations, x, own) for stack, own in zip(stacks, caches, strict=True))
        assert torch.equal(native, one_by_one)
        assert all(torch.equal(*pair) for pair in zip(*caches, strict=True))
        assert [stack.num_layers_done for stack in stacks] == [steps * len(layers)] * 2


def test_layers_without_native_kernels_are_called_one_by_one() -> None:
    operations = choose_operations(CPU, torch.float32, 24)
    layer = make_layer(operations, None)
    narrow = replace(layer, attention=replace(layer.attention, head_dim=24))
    assert isinstance(make_stack([narrow], can_be_native=True), TorchStack)
