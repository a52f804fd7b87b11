"""All layers in one native call: the same bits as the layers called one by one, in the stream and in the caches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionPlan, Span
from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.native.layers import LayerForm, LayerParts, NativeLayers, native_layers
from tensorweave.kernels.operations import Operations
from tests.kernels.attention.spans import plan_of
from tests.kernels.forms import needs_native, operations_of

D, WIDTH, H, KV_HEADS, GROUP, P, NUM_BLOCKS = 48, 40, 32, 2, 3, 8, 120
EPSILON = 1e-5
PLAIN = LayerForm(head_dim=H, epsilon=EPSILON, scale=H**-0.5)
OTHER = LayerForm(
    head_dim=H,
    epsilon=EPSILON,
    scale=0.3,
    norm_offset=1.0,
    soft_cap=2.0,
    update_factor=0.3,
    is_gelu=True,
    has_neighbours=True,
)

pytestmark = needs_native


def make_layer(dtype: torch.dtype, window: int | None, is_narrow: bool, is_odd: bool) -> LayerParts:
    """An odd layer has biases, head norms, norms behind attention and MLP, sinks and the second rotation."""

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
        rope=int(is_odd),
        after_attention_D=vector(D) if is_odd else None,
        after_mlp_D=vector(D) if is_odd else None,
        sinks_N=torch.randn(GROUP * KV_HEADS) if is_odd else None,
    )


def compute_one_by_one(
    operations: Operations,
    layer: LayerParts,
    form: LayerForm,
    x: Tensor,
    update: Tensor | None,
    table: Tensor,
    cache: Tensor,
    plan: AttentionPlan,
) -> Tensor:
    def norm(x: Tensor, update: Tensor | None, weight: Tensor) -> Tensor:
        return operations.add_rms_norm(x, update, weight, EPSILON, form.norm_offset)

    def finish(update: Tensor, weight: Tensor | None) -> Tensor:
        changed = update if weight is None else norm(update, None, weight)
        return changed * form.update_factor

    head_norms = layer.head_norms and replace(layer.head_norms, offset=form.norm_offset)
    heads = layer.qkv(norm(x, update, layer.attention_norm_D)).view(len(x), -1, H)
    q = operations.place_heads(heads, table, cache, plan.slots, head_norms, has_neighbours=form.has_neighbours)
    out = plan.attend(q, cache, layer.window, form.scale, soft_cap=form.soft_cap, sinks_N=layer.sinks_N)
    attended = finish(layer.output(out.flatten(1)), layer.after_attention_D)
    activate = operations.gelu_mul if form.is_gelu else operations.silu_mul
    active = activate(layer.gate_up(norm(x, attended, layer.mlp_norm_D)))
    return finish(layer.down(active), layer.after_mlp_D)


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
@pytest.mark.parametrize("form", [PLAIN, OTHER])
def test_the_same_bits_as_one_by_one(
    form: LayerForm, lengths: list[tuple[int, int]], dtype: torch.dtype, is_narrow: bool
) -> None:
    windows: list[int | None] = [None, 7, None]
    layers = [make_layer(dtype, window, is_narrow, bool(i % 2)) for i, window in enumerate(windows)]
    operations = operations_of("native", dtype, H)

    def plan(lengths: list[tuple[int, int]]) -> NativeAttentionPlan:
        made = plan_of(operations, make_batch(lengths), KV_HEADS, (0, 1), H, P, windows)
        assert isinstance(made, NativeAttentionPlan)
        return made

    whole, T = plan(lengths), sum(length for _, length in lengths)
    angles = [torch.rand(T, H // 2 if form is PLAIN else H // 4) * 6 for _ in range(2)]
    tables, x = [torch.cat([each.cos(), each.sin()], -1) for each in angles], torch.randn(T, D).to(dtype)
    caches = [torch.randn(NUM_BLOCKS, 2 * KV_HEADS, P, H).to(dtype) for _ in layers]

    expected, expected_caches = x.clone(), [cache.clone() for cache in caches]
    update = None
    for layer, cache in zip(layers, expected_caches, strict=True):
        table = tables[layer.rope]
        update = compute_one_by_one(operations, layer, form, expected, update, table, cache, whole)
    assert update is not None
    expected += update

    native = native_layers(layers, form)
    assert isinstance(native, NativeLayers)
    small_first = [cache.clone() for cache in caches]
    native(x[:1].clone(), [table[:1] for table in tables], plan([(0, 1)]), small_first)
    ours = native(x.clone(), tables, whole, caches)
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
    assert native_layers([layer], PLAIN) is not None
    assert native_layers([layer, odd], PLAIN) is None
    assert native_layers([layer], replace(PLAIN, head_dim=24)) is None
