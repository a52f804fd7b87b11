"""Residual addition with norm, and the first kernel of a step, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tensorweave.kernels.linear.quantized import QuantizedRows, UnscaledProduct
from tensorweave.kernels.linear.triton_quantize import make_peaks
from tensorweave.kernels.norm.triton import add_rms_norm, embed
from tensorweave.kernels.weights import quantize_rows
from tests.kernels.linear.test_triton_quantized import assert_same_rows

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPSILON = 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("T", "D"), [(1, 4096), (5, 576), (3, 33)])
def test_add_rms_norm(T: int, D: int, adds: bool, dtype: torch.dtype, device: torch.device, pdl: bool) -> None:
    x, update = torch.randn(2, T, D, device=device).to(dtype)
    weight = torch.rand(D, device=device).to(dtype)
    total = (x.double() + update.double()).to(dtype) if adds else x.clone()
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
    out = torch.full_like(x, float("nan"))
    add_rms_norm(x, update if adds else None, weight, EPSILON, out, pdl=pdl)
    torch.testing.assert_close(x, total, atol=0, rtol=2**-7 if device.type == "cpu" else 0)  # interpreted: truncated
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("T", "D"), [(1, 4096), (5, 576), (3, 40)])
def test_add_rms_norm_to_8_bits(T: int, D: int, adds: bool, device: torch.device, pdl: bool, gpu_only: None) -> None:
    x, update = torch.randn(2, T, D, device=device).bfloat16()
    row_scales, scales = torch.rand(T, device=device), torch.rand(D, device=device)
    weight = torch.rand(D, device=device).bfloat16()
    before, out = x.clone(), QuantizedRows.empty(T, D, device)
    add_rms_norm(x, UnscaledProduct(update, row_scales, scales) if adds else None, weight, EPSILON, out, pdl=pdl)
    total = before.double() + (update.double() * (row_scales[:, None] * scales).double() if adds else 0)
    torch.testing.assert_close(x.double(), total, atol=1e-6, rtol=2**-8)
    values, peak_scales = quantize_rows(x * weight)
    assert_same_rows(out.values_MK, values)  # as a product of few rows reads them
    factor = (x.double().square().mean(-1) + EPSILON).rsqrt()
    torch.testing.assert_close(out.scales_M.double(), peak_scales.double() * factor, atol=0, rtol=1e-5)


@pytest.mark.parametrize(("T", "D", "Q"), [(1, 4096, 64), (3, 576, 9), (2, 40, 1)])
def test_embed(T: int, D: int, Q: int, device: torch.device, pdl: bool) -> None:
    table = torch.randn(11, D, device=device).bfloat16()
    gain = torch.rand(D, device=device).bfloat16()
    tokens = torch.randint(0, 11, (T,), device=device)
    x, gained = (torch.full((T, D), float("nan"), device=device, dtype=torch.bfloat16) for _ in range(2))
    squares = torch.full((T, Q), float("nan"), device=device)
    peaks = make_peaks(T, device=device)
    embed(tokens, table, gain, x, gained, squares, peaks_TA=peaks, pdl=pdl)
    assert torch.equal(peaks.view(torch.float32).amax(1), gained.float().abs().amax(1))
    assert torch.equal(x, table[tokens])
    torch.testing.assert_close(gained, (table[tokens].double() * gain.double()).bfloat16(), atol=0, rtol=2**-7)
    expected = table[tokens].double().square().view(T, Q, -1).sum(-1)
    torch.testing.assert_close(squares.double(), expected, atol=1e-4, rtol=1e-5)
