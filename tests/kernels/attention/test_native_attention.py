"""The native backend of attention: against the oracle, and the same bits in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionPlan, Span
from tensorweave.kernels.attention.native import NativeAttentionPlan
from tensorweave.kernels.attention.reference import paged_attention_reference
from tensorweave.kernels.native.library import use_threads
from tensorweave.kernels.weights import FP8
from tests.kernels.attention.spans import MIXES, make_spans, plan_of
from tests.kernels.forms import NATIVE, assert_close, needs_native, operations_of

pytestmark = needs_native

LONG = {**MIXES, "long": [(255, 1), (256, 1), (257, 1), (900, 1), (0, 1), (0, 5), (511, 1)]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("window", [None, 1, 6, 100, 300])
@pytest.mark.parametrize(
    ("num_kv_heads", "read_heads", "group", "H"), [(2, (0, 1), 3, 64), (2, (0, 1, 1), 1, 32), (1, (0,), 20, 96)]
)
@pytest.mark.parametrize("mix", LONG)
def test_attention(
    mix: str, num_kv_heads: int, read_heads: tuple[int, ...], group: int, H: int, window: int | None, dtype: torch.dtype
) -> None:
    P, num_blocks = 8, 330
    spans = make_spans(LONG[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 2 * num_kv_heads, P, H).to(dtype)
    heads = torch.randn(sum(span.length for span in spans), len(read_heads) * group + 2 * num_kv_heads, H).to(dtype)
    q = heads[:, : len(read_heads) * group]
    plan = plan_of(operations_of("native", dtype, H), spans, num_kv_heads, read_heads, H, P, {window, None, 2})
    assert isinstance(plan, NativeAttentionPlan)
    kv_of_query = [head for head in read_heads for _ in range(group)]
    expected = paged_attention_reference(q, cache, spans, kv_of_query, window, H**-0.5)
    assert_close(plan.attend(q, cache, window, H**-0.5), expected, "native", factor=5)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize(
    ("group", "H", "P", "soft_cap"),
    [(1, 32, 16, None), (3, 64, 16, None), (5, 48, 7, None), (20, 64, 1, None), (3, 64, 16, 2.0)],
)
def test_attention_has_the_same_bits_in_any_batch_any_chunks_and_on_any_number_of_threads(
    group: int, H: int, P: int, soft_cap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [(0, 700), (3, 1), (90, 40), (513, 1)]
    num_blocks = 2100 // P + 8
    spans = make_spans(lengths, P, num_blocks)
    cache, q = torch.randn(num_blocks, 4, P, H).to(dtype), torch.randn(742, 2 * group, H).to(dtype)
    operations = operations_of("native", dtype, H)
    sinks = None if soft_cap is None else torch.randn(2 * group)

    def attend(spans: list[Span], q: Tensor) -> Tensor:
        plan: AttentionPlan = plan_of(operations, spans, 2, (0, 1), H, P, {window})
        assert isinstance(plan, NativeAttentionPlan)
        return plan.attend(q, cache, window, 0.125, soft_cap=soft_cap, sinks_N=sinks)

    whole = attend(spans, q)
    assert use_threads(3)
    for span in spans:
        for first, last in ((0, 1), (5, 7), (5, 38), (8, 9), (span.length - 70, span.length)):
            first, last = max(0, min(first, span.length - 1)), min(last, span.length)
            part = Span(0, last - first, span.start + first, span.blocks)
            rows = slice(span.first_row + first, span.first_row + last)
            assert torch.equal(attend([part], q[rows]), whole[rows])


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("window", [None, 6, 300])
def test_attention_does_not_touch_what_no_query_sees(window: int | None, dtype: torch.dtype) -> None:
    P = 8
    spans = make_spans([(0, 70), (500, 1), (310, 3), (20, 1)], P, 130)
    cache, q = torch.full((130, 2, P, 64), torch.nan).to(dtype), torch.randn(75, 3, 64).to(dtype)
    for span in spans:
        first = 0 if window is None else max(0, span.start + 1 - window)
        for i in range(first, span.stop):
            cache[span.blocks[i // P], :, i % P] = torch.randn(2, 64).to(dtype)
    plan = plan_of(operations_of("native", dtype), spans, 1, (0,), 64, P, {window})
    assert plan.attend(q, cache, window, 0.125).isfinite().all()


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_attention_to_a_few_keys_of_many(scale: float, dtype: torch.dtype) -> None:
    """From weights that are all alike to weights that vanish."""
    spans = make_spans([(0, 300), (290, 1)], 16, 45)
    cache, q = torch.randn(45, 2, 16, 64).to(dtype), torch.randn(301, 3, 64).to(dtype)
    expected = paged_attention_reference(q.double(), cache.double(), spans, (0, 0, 0), None, scale)
    plan = plan_of(operations_of("native", dtype), spans, 1, (0,), 64, 16, {None})
    assert_close(plan.attend(q, cache, None, scale), expected, "native", factor=5 * max(1, scale))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(("group", "H", "window"), [(3, 64, None), (20, 32, 300), (1, 96, 6)])
def test_a_cache_of_8_bit_floats_gives_the_bits_of_the_same_numbers_in_the_rows_type(
    group: int, H: int, window: int | None, dtype: torch.dtype
) -> None:
    """Among them every one that is no NaN, the smallest too."""
    P, num_blocks = 8, 330
    spans = make_spans(LONG["long"], P, num_blocks)
    codes = torch.randint(0, 0x7F, (num_blocks, 4, P, H)) + 0x80 * torch.randint(0, 2, (num_blocks, 4, P, H))
    cache = codes.to(torch.uint8).view(FP8)
    q = torch.randn(sum(span.length for span in spans), 2 * group, H).to(dtype) / 64
    plan = plan_of(operations_of("native", dtype, H), spans, 2, (0, 1), H, P, {window})
    narrow, wide = (plan.attend(q, each, window, H**-0.5) for each in (cache, cache.to(dtype)))
    assert torch.equal(narrow, wide)
    assert narrow.isfinite().all()
