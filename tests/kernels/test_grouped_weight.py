"""Weights of integers in groups: what they stand for, exactly, and their parts."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tensorweave.kernels.linear.reference import make_linear
from tensorweave.kernels.weights import GroupedWeight, stack_grouped

FORMS: list[tuple[Literal[4, 8], int]] = [(4, 0), (4, 8), (8, 128)]


def random_weight(
    N: int, K: int, bits: Literal[4, 8] = 4, zero: int = 0, size: int = 32, *, has_minimums: bool = False
) -> GroupedWeight:
    """With scales and minimums of eleven bits, as half precision has them."""
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    G = -(-K // size)
    scales, minimums = torch.rand(N, G).half().float(), torch.randn(N, G).half().float()
    return GroupedWeight.of_codes(
        codes,
        scales,
        minimums if has_minimums else None,
        group_size=size,
        bits=bits,
        zero=zero,
        dtype=torch.float32,
    )


def exact_rows(weight: GroupedWeight) -> torch.Tensor:
    codes = weight.codes_NK().double()
    group_K = torch.arange(weight.num_inputs) // weight.group_size
    rows = weight.scales_NG.double()[:, group_K] * (codes - weight.zero)
    return rows if weight.minimums_NG is None else rows + weight.minimums_NG.double()[:, group_K]


@pytest.mark.parametrize(("bits", "zero"), FORMS)
@pytest.mark.parametrize("has_minimums", [False, True])
@pytest.mark.parametrize(("K", "size"), [(64, 32), (72, 32), (37, 16), (40, 1000)])
def test_rows(bits: Literal[4, 8], zero: int, has_minimums: bool, K: int, size: int) -> None:
    weight = random_weight(5, K, bits, zero, size, has_minimums=has_minimums)
    assert torch.equal(weight.wide_rows(), exact_rows(weight).float())
    assert weight.codes.numel() == 5 * (K if bits == 8 else -(-K // 2))
    x, bias = torch.randn(3, K), torch.randn(5)
    linear = make_linear(weight, bias)
    exact = x.double() @ exact_rows(weight).T + bias
    rounding = 2 / (127 * 256) * x.abs().max().item() * exact_rows(weight).abs().sum(1).max().item()
    torch.testing.assert_close(linear(x).double(), exact, rtol=1e-5, atol=rounding)
    assert linear.to_float32(x.bfloat16()).dtype == torch.float32
    assert linear(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "zero"), FORMS)
@pytest.mark.parametrize("size", [16, 48, 96])
def test_parts_have_the_weights_of_the_whole(bits: Literal[4, 8], zero: int, size: int) -> None:
    weight = random_weight(7, 96, bits, zero, size, has_minimums=True)
    whole = weight.wide_rows()
    assert torch.equal(weight.outputs(range(2, 5)).wide_rows(), whole[2:5])
    for columns in (range(96), range(48, 96), range(32, 61), range(13, 77)):
        part = weight.inputs(columns)
        assert part.num_inputs == len(columns)
        assert torch.equal(part.wide_rows(), whole[:, columns.start : columns.stop])
    assert weight.inputs(range(48, 96)).group_size == min(48, size)


def test_parts_of_one_form_are_stacked_as_they_are() -> None:
    parts = [random_weight(N, 64, 4, 8) for N in (3, 5)]
    whole = stack_grouped(parts)
    assert (whole.bits, whole.group_size, whole.minimums_NG) == (4, 32, None)
    assert torch.equal(whole.wide_rows(), torch.cat([part.wide_rows() for part in parts]))


def test_parts_of_different_forms_are_stacked_exactly() -> None:
    parts = [
        random_weight(3, 64, 4, 0, 32, has_minimums=True),
        random_weight(2, 64, 8, 128, 16),
        random_weight(4, 64, 4, 8, 1000),
    ]
    whole = stack_grouped(parts)
    assert (whole.bits, whole.group_size) == (8, 16)
    assert torch.equal(whole.wide_rows(), torch.cat([part.wide_rows() for part in parts]))
