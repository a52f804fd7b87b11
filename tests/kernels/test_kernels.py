"""Each op against its plain reference: shapes (one odd) by dtype, with stated tolerances."""

from __future__ import annotations

import random

import pytest
import torch

from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.attention.torch_backend import Planner, Span, paged_attention, paged_attention_reference
from tensorweave.kernels.heads.reference import write_kv
from tensorweave.kernels.heads.rope import rope
from tensorweave.kernels.norm.reference import rms_norm, rms_norm_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (5, 3, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    for op in (rms_norm, rms_norm_reference):
        torch.testing.assert_close(op(x, weight, 1e-5).double(), wide, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (9, 34)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    gate, up = x.double().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(silu_mul(x).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 34)])
def test_rope_turns_pairs_as_complex_numbers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    T, _, H = shape
    x, angles = torch.randn(shape).to(dtype), torch.rand(T, H // 2) * 6
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(
        torch.ones(T, 1, H // 2).double(), angles.double().unsqueeze(1)
    )
    ours = rope(x, torch.cat([angles.cos(), angles.sin()], -1))
    assert ours.dtype == dtype
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def make_spans(lengths: list[tuple[int, int]], tokens_per_block: int, num_blocks: int) -> list[Span]:
    """Spans of (start, length), each in random blocks of its own, with spare ones at the end of its table."""
    free = list(range(num_blocks))
    random.Random(0).shuffle(free)
    spans, row = [], 0
    for start, length in lengths:
        count = -(-(start + length) // tokens_per_block) + 1
        spans.append(Span(row, length, start, [free.pop() for _ in range(count)]))
        row += length
    return spans


MIXES = {
    "decodes": [(4, 1), (7, 1), (8, 1), (0, 1)],
    "decodes of unlike lengths": [(3, 1), (150, 1), (2, 1), (149, 1), (40, 1)],
    "whole prompts": [(0, 9), (0, 16), (0, 2)],
    "later chunks": [(5, 9), (16, 16), (31, 2)],
    "a mix": [(0, 17), (60, 1), (13, 6), (5, 1), (33, 1), (0, 270), (20, 260)],
}


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize(("num_kv_heads", "read_heads", "group"), [(2, (0, 1), 3), (1, (0,), 1), (2, (0, 1, 1), 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_paged_attention(
    mix: str, num_kv_heads: int, read_heads: tuple[int, ...], group: int, window: int | None
) -> None:
    torch.manual_seed(0)
    P, H, num_blocks = 8, 4, 110
    spans = make_spans(MIXES[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 2 * num_kv_heads, P, H)
    q = torch.randn(sum(span.length for span in spans), len(read_heads) * group, H)
    plan = Planner(num_kv_heads, read_heads, P, H, CPU, torch.float32).plan(spans, window)
    kv_of_query = [head for head in read_heads for _ in range(group)]
    expected = paged_attention_reference(q, cache, spans, kv_of_query, window, 0.4)
    torch.testing.assert_close(paged_attention(q, cache, plan, 0.4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [4, 64])  # torch's path; the native kernel, where there is one
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("mix", MIXES)
def test_nan_in_the_blocks_of_others_changes_nothing(mix: str, window: int | None, head_dim: int) -> None:
    torch.manual_seed(0)
    P, num_blocks = 8, 110
    spans = make_spans(MIXES[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 4, P, head_dim)
    own = {block for span in spans for block in span.blocks[: -(-span.stop // P)]}
    cache[[block for block in range(num_blocks) if block not in own]] = torch.nan
    q = torch.randn(sum(span.length for span in spans), 2, head_dim)
    plan = Planner(2, (0, 1), P, head_dim, CPU, torch.float32).plan(spans, window)
    expected = paged_attention_reference(q, cache, spans, [0, 1], window, 0.1)
    assert expected.isfinite().all()
    torch.testing.assert_close(paged_attention(q, cache, plan, 0.1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paged_attention_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spans = make_spans(MIXES["a mix"], 16, 80)
    cache, q = torch.randn(80, 4, 16, 8).to(dtype), torch.randn(spans[-1].first_row + spans[-1].length, 4, 8).to(dtype)
    plan = Planner(2, (0, 1), 16, 8, CPU, dtype).plan(spans, 50)
    expected = paged_attention_reference(q, cache, spans, (0, 0, 1, 1), 50, 0.35)
    torch.testing.assert_close(
        paged_attention(q, cache, plan, 0.35), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_write_kv_fills_the_slots_and_nothing_else() -> None:
    cache = torch.zeros(5, 4, 8, 3)
    kv = torch.randn(3, 4, 3)
    slots = torch.tensor([2 * 8 + 7, 4 * 8, 0])
    write_kv(cache, kv, Planner(2, (0, 1), 8, 3, CPU, torch.float32).write_slots(slots).rows)
    assert torch.equal(cache[[2, 4, 0], :, [7, 0, 0]], kv)
    assert int((cache != 0).sum()) == kv.numel()


@pytest.mark.usefixtures("plain_torch")
def test_decodes_are_grouped_within_a_bound_of_memory_and_padding() -> None:
    lengths = [(start, 1) for start in (900, 20, 950, 33, 2000, 25, 910)]
    spans = make_spans(lengths, 16, 500)
    roomy = Planner(8, tuple(range(8)), 16, 8, CPU, torch.float32).plan(spans, None)
    assert [group.size for group in roomy.decodes] == [3, 3, 1]
    tight = Planner(8, tuple(range(8)), 16, 64, CPU, torch.float32).plan(spans, None)
    assert [group.size for group in tight.decodes] == [3, 1, 1, 1, 1]
