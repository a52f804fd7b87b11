"""Products of 8-bit rows in torch against float64, scaled at once or by what reads them."""

from __future__ import annotations

import torch

from tensorweave.kernels.linear.quantized import QuantizedRows, can_scale, scaled_linear, unscaled_linear
from tensorweave.kernels.weights import FP8, quantize_rows, quantize_weight


def test_products_of_8_bit_rows() -> None:
    x, bias = torch.randn(5, 48).bfloat16(), torch.randn(32).bfloat16()
    weight = quantize_weight(torch.randn(32, 48).bfloat16())
    rows = QuantizedRows(*quantize_rows(x))
    wide = rows.values_MK.double() * rows.scales_M.double()[:, None]
    expected = wide @ (weight.values_NK.double() * weight.scales_N.double()[:, None]).T
    ours = scaled_linear(rows, weight, bias_N=bias)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), expected + bias, atol=1e-3, rtol=2**-8)
    out = torch.empty(5, 32, dtype=torch.bfloat16)
    assert scaled_linear(rows, weight, out) is out
    product = unscaled_linear(rows, weight, torch.ones(()), torch.empty(5, 32, dtype=torch.bfloat16))
    scaled = product.values_MN.double() * product.row_scales_M.double()[:, None] * product.scales_N.double()
    torch.testing.assert_close(scaled, expected, atol=1e-3, rtol=2**-7)


def test_the_products_that_torch_can_scale() -> None:
    assert can_scale(quantize_weight(torch.randn(32, 48).bfloat16()))
    assert not can_scale(quantize_weight(torch.randn(32, 40).bfloat16()))
    assert not can_scale(quantize_weight(torch.randn(32, 48)))


def test_rows_of_zeros_and_of_tiny_numbers() -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = 1e-40, -3e38
    values, scales = quantize_rows(x)
    assert values.dtype == FP8
    assert torch.isfinite(values.float()).all()
    assert values[2, 3].item() == -448
    torch.testing.assert_close(values.float() * scales[:, None], x, atol=1e-38, rtol=1 / 16)
