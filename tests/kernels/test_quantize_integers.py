"""Matrices to integers in groups: the error of a weight, and the type of scales."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tensorweave.kernels import quantize_integers as module
from tensorweave.kernels.quantize_integers import quantize_integers
from tests.kernels.forms import needs_native


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


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 32, 43])
def test_native_integers_are_as_good_as_those_of_torch(
    dtype: torch.dtype, bits: Literal[4, 8], group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two trials are nearly as good as each other, either may be taken: their sums have another order."""
    torch.manual_seed(bits)
    weight = (torch.randn(70, 181) * torch.rand(70, 1)).to(dtype)
    weight[3], weight[4, 5], weight[5] = 0, -9, weight[5].abs()
    native = quantize_integers(weight, bits=bits, group_size=group_size, row_bits=16)
    monkeypatch.setattr(module, "load_native", lambda dtype: None)
    torchs = quantize_integers(weight, bits=bits, group_size=group_size, row_bits=16)
    assert (native.codes_NK() == torchs.codes_NK()).float().mean() > 0.9
    errors = [(made.wide_rows() - weight.float()).square().sum(1) for made in (native, torchs)]
    torch.testing.assert_close(errors[0], errors[1], rtol=5e-2, atol=1e-9)
    assert (native.codes.shape, native.zero, native.scales_NG.dtype, native.dtype) == (
        torchs.codes.shape,
        torchs.zero,
        torchs.scales_NG.dtype,
        torchs.dtype,
    )
