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


@pytest.mark.parametrize("group_size", [32, 128])
def test_minimums(group_size: int) -> None:
    weight = torch.randn(50, 160) + 1
    weight[3], weight[4] = 0, 2.5
    made = quantize_integers(weight, bits=4, group_size=group_size, row_bits=16, has_minimums=True)
    assert made.minimums_NG is not None
    assert (made.zero, made.scales_NG.dtype, made.minimums_NG.dtype) == (0, torch.float16, torch.float16)
    for group in range(made.num_groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        part, ours = weight[:, columns], made.wide_rows()[:, columns]
        low = part.amin(1, keepdim=True)
        scales = (part.amax(1, keepdim=True) - low).clamp_min(1e-9) / 15
        nearest = ((part - low) / scales).round() * scales + low
        assert ((ours - part).square().sum(1) <= (nearest - part).square().sum(1) * 1.01 + 1e-6).all()
    assert torch.equal(made.wide_rows()[3:5], weight[3:5])


def test_weights_of_sixteen_levels_stay_as_they_are() -> None:
    scales, minimums = torch.rand(20, 3, 1).half() + 0.1, torch.randn(20, 3, 1).half()
    codes = torch.randint(0, 16, (20, 3, 32))
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    weight = (codes * scales.float() + minimums.float()).flatten(1)
    made = quantize_integers(weight, bits=4, group_size=32, row_bits=16, has_minimums=True)
    torch.testing.assert_close(made.wide_rows(), weight, rtol=2e-3, atol=2e-3)
