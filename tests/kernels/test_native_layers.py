"""All layers in one native call: the same bits as the layers called one by one, in the stream and in the caches."""

from __future__ import annotations

import random

import pytest
import torch

from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.attention.torch_backend import Planner, Span, paged_attention
from tensorweave.kernels.heads.reference import HeadNorms, place_heads
from tensorweave.kernels.linear.reference import make_linear
from tensorweave.kernels.native.layers import LayerWeights, NativeLayers, native_layers
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.norm.reference import add_rms_norm

D, WIDTH, H, KV_HEADS, GROUP, P, NUM_BLOCKS = 48, 40, 32, 2, 3, 8, 120
EPSILON = 1e-5

pytestmark = pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")


def make_layer(dtype: torch.dtype, window: int | None, is_narrow: bool, is_odd: bool) -> LayerWeights:
    """An odd layer has biases and head norms."""

    def weight(num_outputs: int, num_inputs: int) -> torch.Tensor:
        values = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
        return (values.bfloat16() if is_narrow else values).to(dtype)

    def vector(size: int) -> torch.Tensor:
        return torch.rand(size).to(dtype)

    X, Q = (GROUP + 2) * KV_HEADS * H, GROUP * KV_HEADS * H
    return LayerWeights(
        vector(D),
        make_linear(weight(X, D), vector(X) if is_odd else None),
        HeadNorms(vector(H), vector(H), EPSILON) if is_odd else None,
        make_linear(weight(D, Q), vector(D) if is_odd else None),
        vector(D),
        make_linear(weight(2 * WIDTH, D)),
        make_linear(weight(D, WIDTH)),
        window,
    )


def make_batch(lengths: list[tuple[int, int]]) -> tuple[list[Span], torch.Tensor]:
    """Spans over scattered blocks, and the slots of their tokens."""
    free = list(range(NUM_BLOCKS))
    random.Random(0).shuffle(free)
    spans, slots = [], []
    for start, length in lengths:
        blocks = [free.pop() for _ in range(-(-(start + length) // P))]
        spans.append(Span(len(slots), length, start, blocks))
        slots += [blocks[i // P] * P + i % P for i in range(start, start + length)]
    return spans, torch.tensor(slots)


@pytest.mark.parametrize(
    ("dtype", "is_narrow"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("lengths", [[(0, 1)], [(0, 30), (9, 1), (3, 20), (17, 1)], [(0, 460), (100, 1)]])
def test_the_same_bits_as_one_by_one(lengths: list[tuple[int, int]], dtype: torch.dtype, is_narrow: bool) -> None:
    torch.manual_seed(0)
    windows: list[int | None] = [None, 7, None]
    layers = [make_layer(dtype, window, is_narrow, bool(i % 2)) for i, window in enumerate(windows)]
    spans, slots = make_batch(lengths)
    T = len(slots)
    planner = Planner(KV_HEADS, (0, 1), P, H, torch.device("cpu"), dtype)
    write, plans = planner.write_slots(slots), {window: planner.plan(spans, window) for window in windows}
    angles = torch.rand(T, H // 2) * 6
    table, x = torch.cat([angles.cos(), angles.sin()], -1), torch.randn(T, D).to(dtype)
    caches = [torch.randn(NUM_BLOCKS, 2 * KV_HEADS, P, H).to(dtype) for _ in layers]

    expected, expected_caches = x.clone(), [cache.clone() for cache in caches]
    update = None
    for layer, cache in zip(layers, expected_caches, strict=True):
        heads = layer.qkv(add_rms_norm(expected, update, layer.attention_norm_D, EPSILON)).view(T, -1, H)
        q = place_heads(heads, table, cache, write, layer.head_norms)
        attended = layer.output(paged_attention(q, cache, plans[layer.window], H**-0.5).flatten(1))
        update = layer.down(silu_mul(layer.gate_up(add_rms_norm(expected, attended, layer.mlp_norm_D, EPSILON))))
    assert update is not None
    expected += update

    native = native_layers(layers, H, EPSILON)
    assert isinstance(native, NativeLayers)
    small_first = make_batch([(0, 2)])
    small_plans = {window: planner.plan(small_first[0], window) for window in windows}
    scratch_caches = [cache.clone() for cache in caches]
    native(x[:2].clone(), table[:2], planner.write_slots(small_first[1]), small_plans, scratch_caches)
    ours = native(x.clone(), table, write, plans, caches)
    assert torch.equal(ours, expected)
    for mine, theirs in zip(caches, expected_caches, strict=True):
        assert torch.equal(mine, theirs)


def test_what_has_no_native_kernel_is_left_to_be_called_one_by_one() -> None:
    layer = make_layer(torch.float32, None, False, False)
    odd = LayerWeights(
        layer.attention_norm_D,
        layer.qkv,
        None,
        layer.output,
        layer.mlp_norm_D,
        layer.gate_up,
        make_linear(torch.randn(D, 41)),
        None,
    )
    assert native_layers([layer], H, EPSILON) is not None
    assert native_layers([layer, odd], H, EPSILON) is None
    assert native_layers([layer], 24, EPSILON) is None
