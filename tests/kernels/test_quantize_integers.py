"""Matrices to integers in groups: the error of a weight, and the type of scales."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.quantize_integers import quantize_integers


@pytest.mark.parametrize("group_size", [None, 32])
def test_8_bits(group_size: int | None) -> None:
    weight = torch.randn(600, 72).bfloat16()
    weight[3], weight[4, 5] = 0, 90
    made = quantize_integers(weight, bits=8, group_size=group_size, row_bits=16)
    assert (made.num_groups, made.dtype, made.minimums_NG) == (1 if group_size is None else 3, torch.bfloat16, None)
    steps = made.scales_NG.repeat_interleave(made.group_size, 1)[:, :72]
    assert ((made.wide_rows() - weight.float()).abs() <= steps * 0.5001).all()
    assert not made.wide_rows()[3].any()


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_4_bits_have_a_smaller_error_than_the_nearest_multiples_of_the_largest_magnitude(group_size: int) -> None:
    weight = torch.randn(50, 160)
    weight[3] = 0
    made = quantize_integers(weight, bits=4, group_size=group_size, row_bits=8)
    assert (made.row_bits, made.scales_NG.dtype) == (8, torch.float16)
    for group in range(made.num_groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        part, ours = weight[:, columns], made.wide_rows()[:, columns]
        scales = part.abs().amax(1, keepdim=True).clamp_min(1e-9) / 7
        nearest = (part / scales).round() * scales
        assert ((ours - part).square().sum(1) <= (nearest - part).square().sum(1) * 1.01).all()
    assert not made.wide_rows()[3].any()


def test_scales_that_half_precision_does_not_have_are_in_float32() -> None:
    weight = torch.randn(8, 64)
    weight[5] *= 1e-7
    made = quantize_integers(weight, bits=4, group_size=32, row_bits=16)
    assert made.scales_NG.dtype == torch.float32
    error = (made.wide_rows() - weight).norm(dim=1) / weight.norm(dim=1)
    assert error.max() < 0.15
