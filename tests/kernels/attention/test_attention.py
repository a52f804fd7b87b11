"""Both backends of attention against the oracle: mixes of chunks and decodes, windows, heads that do not divide."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.attention.reference import paged_attention_reference
from tensorweave.kernels.attention.torch_backend import TorchAttentionPlan
from tests.kernels.attention.spans import MIXES, make_spans, plan_of
from tests.kernels.forms import NATIVE, TOLERANCE, assert_close, operations_of


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize(("num_kv_heads", "read_heads", "group"), [(2, (0, 1), 3), (1, (0,), 1), (2, (0, 1, 1), 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_torch_attention(
    mix: str, num_kv_heads: int, read_heads: tuple[int, ...], group: int, window: int | None
) -> None:
    P, H, num_blocks = 8, 4, 110
    spans = make_spans(MIXES[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 2 * num_kv_heads, P, H)
    q = torch.randn(sum(span.length for span in spans), len(read_heads) * group, H)
    operations = operations_of("reference", torch.float32)
    plan = plan_of(operations, spans, num_kv_heads, read_heads, H, P, {window, None, 3})
    kv_of_query = [head for head in read_heads for _ in range(group)]
    expected = paged_attention_reference(q, cache, spans, kv_of_query, window, 0.4)
    torch.testing.assert_close(plan.attend(q, cache, window, 0.4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "dtype"), [("reference", torch.float32), *[("native", each) for each in NATIVE]])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(0.7, False), (None, True), (30.0, True)])
@pytest.mark.parametrize("mix", ["decodes of unlike lengths", "later chunks"])
def test_soft_caps_and_sinks(
    mix: str, soft_cap: float | None, has_sinks: bool, window: int | None, form: str, dtype: torch.dtype
) -> None:
    """Scores reach far beyond a cap, and sinks from nothing to nearly all of a softmax."""
    P, H, num_blocks, scale = 8, 32, 110, 1.5
    spans = make_spans(MIXES[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 4, P, H).to(dtype)
    q = (torch.randn(sum(span.length for span in spans), 6, H) / H**0.25).to(dtype)
    sinks = torch.tensor([-90.0, -3.0, 0.0, 2.0, 9.0, 90.0]) if has_sinks else None
    plan = plan_of(operations_of(form, dtype, H), spans, 2, (0, 1), H, P, {window})
    assert isinstance(plan, NativeAttentionPlan if form == "native" else TorchAttentionPlan)
    expected = paged_attention_reference(
        q.double(), cache.double(), spans, [0] * 3 + [1] * 3, window, scale, soft_cap=soft_cap, sinks_N=sinks
    )
    ours = plan.attend(q, cache, window, scale, soft_cap=soft_cap, sinks_N=sinks)
    assert_close(ours, expected, form, factor=10)


@pytest.mark.parametrize("form", ["reference", "native"])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("mix", MIXES)
def test_nan_in_the_blocks_of_others_changes_nothing(mix: str, window: int | None, head_dim: int, form: str) -> None:
    P, num_blocks = 8, 110
    spans = make_spans(MIXES[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 4, P, head_dim)
    own = {block for span in spans for block in span.blocks[: -(-span.stop // P)]}
    cache[[block for block in range(num_blocks) if block not in own]] = torch.nan
    q = torch.randn(sum(span.length for span in spans), 2, head_dim)
    plan = plan_of(operations_of(form, torch.float32, head_dim), spans, 2, (0, 1), head_dim, P, {window})
    assert isinstance(plan, NativeAttentionPlan if form == "native" else TorchAttentionPlan)
    expected = paged_attention_reference(q, cache, spans, [0, 1], window, 0.1)
    assert expected.isfinite().all()
    torch.testing.assert_close(plan.attend(q, cache, window, 0.1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_attention_in_half_precision(dtype: torch.dtype) -> None:
    spans = make_spans(MIXES["a mix"], 16, 80)
    cache, q = torch.randn(80, 4, 16, 8).to(dtype), torch.randn(spans[-1].first_row + spans[-1].length, 4, 8).to(dtype)
    plan = plan_of(operations_of("reference", dtype), spans, 2, (0, 1), 8, 16, {50})
    expected = paged_attention_reference(q, cache, spans, (0, 0, 1, 1), 50, 0.35)
    tolerance = TOLERANCE["reference", dtype]
    torch.testing.assert_close(plan.attend(q, cache, 50, 0.35), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", ["reference", "native"])
def test_what_is_written_is_what_is_attended(form: str) -> None:
    """One token alone, which attends to itself: the answer is its value."""
    spans = make_spans([(0, 1), (0, 1)], 8, 12)
    plan = plan_of(operations_of(form, torch.float32), spans, 2, (0, 1), 64, 8, {None, 4})
    cache, kv = torch.full((12, 4, 8, 64), 7.0), torch.randn(2, 4, 64)
    plan.write(kv, cache)
    for window in (None, 4):
        torch.testing.assert_close(plan.attend(torch.randn(2, 2, 64), cache, window, 0.1), kv[:, 2:])


def test_decodes_are_grouped_within_a_bound_of_memory_and_padding() -> None:
    lengths = [(start, 1) for start in (900, 20, 950, 33, 2000, 25, 910)]
    spans, heads = make_spans(lengths, 16, 500), tuple(range(8))
    for head_dim, sizes in ((8, [3, 3, 1]), (64, [3, 1, 1, 1, 1])):
        plan = plan_of(operations_of("reference", torch.float32), spans, 8, heads, head_dim, 16, {None})
        assert isinstance(plan, TorchAttentionPlan)
        assert [group.size for group in plan.windows[None].decodes] == sizes
