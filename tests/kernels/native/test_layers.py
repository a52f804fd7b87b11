"""All layers in one native call: the same bits as the layers called one by one, in the stream and in the caches."""

from __future__ import annotations

import random

import pytest
import torch

from tensorweave.kernels.attention.backend import Span
from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.native.layers import LayerParts, NativeLayers, native_layers
from tests.kernels.attention.spans import plan_of
from tests.kernels.forms import needs_native, operations_of

D, WIDTH, H, KV_HEADS, GROUP, P, NUM_BLOCKS = 48, 40, 32, 2, 3, 8, 120
EPSILON = 1e-5

pytestmark = needs_native


def make_layer(dtype: torch.dtype, window: int | None, is_narrow: bool, is_odd: bool) -> LayerParts:
    """An odd layer has biases and head norms."""

    def weight(num_outputs: int, num_inputs: int) -> torch.Tensor:
        values = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
        return (values.bfloat16() if is_narrow else values).to(dtype)

    def vector(size: int) -> torch.Tensor:
        return torch.rand(size).to(dtype)

    make_linear = operations_of("native", dtype).make_linear
    X, Q = (GROUP + 2) * KV_HEADS * H, GROUP * KV_HEADS * H
    return LayerParts(
        vector(D),
        make_linear(weight(X, D), vector(X) if is_odd else None),
        HeadNorms(vector(H), vector(H), EPSILON) if is_odd else None,
        make_linear(weight(D, Q), vector(D) if is_odd else None),
        vector(D),
        make_linear(weight(2 * WIDTH, D), None),
        make_linear(weight(D, WIDTH), None),
        window,
    )


def make_batch(lengths: list[tuple[int, int]]) -> list[Span]:
    """Spans over scattered blocks."""
    free = list(range(NUM_BLOCKS))
    random.Random(0).shuffle(free)
    spans, row = [], 0
    for start, length in lengths:
        spans.append(Span(row, length, start, [free.pop() for _ in range(-(-(start + length) // P))]))
        row += length
    return spans


@pytest.mark.parametrize(
    ("dtype", "is_narrow"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("lengths", [[(0, 1)], [(0, 30), (9, 1), (3, 20), (17, 1)], [(0, 460), (100, 1)]])
def test_the_same_bits_as_one_by_one(lengths: list[tuple[int, int]], dtype: torch.dtype, is_narrow: bool) -> None:
    windows: list[int | None] = [None, 7, None]
    layers = [make_layer(dtype, window, is_narrow, bool(i % 2)) for i, window in enumerate(windows)]
    operations = operations_of("native", dtype, H)

    def plan(lengths: list[tuple[int, int]]) -> NativeAttentionPlan:
        made = plan_of(operations, make_batch(lengths), KV_HEADS, (0, 1), H, P, windows)
        assert isinstance(made, NativeAttentionPlan)
        return made

    whole, T = plan(lengths), sum(length for _, length in lengths)
    angles = torch.rand(T, H // 2) * 6
    table, x = torch.cat([angles.cos(), angles.sin()], -1), torch.randn(T, D).to(dtype)
    caches = [torch.randn(NUM_BLOCKS, 2 * KV_HEADS, P, H).to(dtype) for _ in layers]

    expected, expected_caches = x.clone(), [cache.clone() for cache in caches]
    add_rms_norm, update = operations.add_rms_norm, None
    for layer, cache in zip(layers, expected_caches, strict=True):
        heads = layer.qkv(add_rms_norm(expected, update, layer.attention_norm_D, EPSILON)).view(T, -1, H)
        q = operations.place_heads(heads, table, cache, whole.slots, layer.head_norms)
        attended = layer.output(whole.attend(q, cache, layer.window, H**-0.5).flatten(1))
        gate_up = layer.gate_up(add_rms_norm(expected, attended, layer.mlp_norm_D, EPSILON))
        update = layer.down(operations.silu_mul(gate_up))
    assert update is not None
    expected += update

    native = native_layers(layers, H, EPSILON)
    assert isinstance(native, NativeLayers)
    small_first = [cache.clone() for cache in caches]
    native(x[:1].clone(), table[:1], plan([(0, 1)]), small_first)
    ours = native(x.clone(), table, whole, caches)
    assert native.num_done == 2 * len(layers)
    assert torch.equal(ours, expected)
    for mine, theirs in zip(caches, expected_caches, strict=True):
        assert torch.equal(mine, theirs)


def test_what_has_no_native_kernel_is_left_to_be_called_one_by_one() -> None:
    layer = make_layer(torch.float32, None, False, False)
    odd = LayerParts(
        layer.attention_norm_D,
        layer.qkv,
        None,
        layer.output,
        layer.mlp_norm_D,
        layer.gate_up,
        operations_of("native", torch.float32).make_linear(torch.randn(D, 41), None),
        None,
    )
    assert native_layers([layer], H, EPSILON) is not None
    assert native_layers([layer, odd], H, EPSILON) is None
    assert native_layers([layer], 24, EPSILON) is None
