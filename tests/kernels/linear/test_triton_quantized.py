"""Products with 8-bit weights on a GPU against float64: what is quantized on the way, and what kernels leave for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.linear.quantized import QuantizedRows, UnscaledProduct, scaled_linear, unscaled_linear
from tensorweave.kernels.linear.thin_tiling import PLAIN, RESIDUAL, Tiling, choose_quantized_tiling
from tensorweave.kernels.linear.triton_quantize import PEAKS_PER_ROW, make_peaks, quantize
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.weights import QuantizedWeight, quantize_rows, quantize_weight
from tests.kernels.linear.test_triton_thin import EPSILON, make_squares, numbers, poisoned, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_only")]  # Triton 3.6's interpreter rounds to e4m3 wrongly

TOLERANCE = 1e-2  # the matrix unit sums products of e4m3 with about 14 bits; bfloat16 rounds besides
SMALL = [(1, 48, 576), (1, 70, 1000), (2, 96, 576), (9, 200, 1024), (17, 200, 528), (64, 128, 512)]
FULL = [(1, 4096, 4096), (1, 4096, 14336), (5, 4096, 4096), (16, 4096, 14336), (64, 4096, 14336), (128, 4096, 4096)]


def make_weight(N: int, K: int, device: torch.device) -> QuantizedWeight:
    return quantize_weight(numbers(N, K, device=device) * 0.05)


def wide(weight: QuantizedWeight) -> Tensor:
    return weight.values_NK.double() * weight.scales_N.double()[:, None]


def rounded(x: Tensor) -> Tensor:
    """What a product reads of x, in float64."""
    values, scales = quantize_rows(x)
    return values.double() * scales.double()[:, None]


def peaks_of(x: Tensor) -> Tensor:
    peaks = make_peaks(len(x), device=x.device)
    peaks[torch.arange(len(x)), torch.randint(PEAKS_PER_ROW, (len(x),))] = x.float().abs().amax(1).view(torch.int32)
    return peaks


def assert_peaks(peaks: Tensor, x: Tensor) -> None:
    assert torch.equal(peaks.view(torch.float32).amax(1), x.float().abs().amax(1))


def assert_same_rows(values: Tensor, expected: Tensor) -> None:
    assert torch.equal(values.view(torch.int8), expected.view(torch.int8))


@pytest.mark.parametrize(("M", "K"), [(1, 5), (3, 1000), (40, 4096)])
def test_rows_are_quantized_as_torch_does(M: int, K: int, device: torch.device, pdl: bool) -> None:
    x = numbers(M, K + 8, device=device)[:, :K]
    x[0] = 0
    out = QuantizedRows.empty(M, K, device)
    quantize(x, out, pdl=pdl)
    values, scales = quantize_rows(x)
    assert_same_rows(out.values_MK, values)
    assert torch.equal(out.scales_M, scales)


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("has_bias", [False, True])
def test_plain(M: int, N: int, K: int, has_bias: bool, device: torch.device, pdl: bool) -> None:
    x, w, bias = numbers(M, K, device=device), make_weight(N, K, device), numbers(N, device=device)
    x[0, 3] = 300.0  # a row of large numbers beside rows of small ones
    squares, factor = make_squares(x)
    out, out_peaks = poisoned(M, N, device=device), make_peaks(M, device=device)
    thin_linear(
        x, w, out, bias_N=bias if has_bias else None, squares_MQ=squares, epsilon=EPSILON, peaks_MA=peaks_of(x),
        out_peaks_MA=out_peaks, workspace=SplitWorkspace.create(N, M, 4, device), pdl=pdl,
    )  # fmt: skip
    expected = rounded(x) @ wide(w).T * factor + (bias.double() if has_bias else 0)
    assert relative_error(out, expected) < TOLERANCE
    assert_peaks(out_peaks, out)


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
def test_gated(M: int, N: int, K: int, device: torch.device, pdl: bool) -> None:
    x, w = numbers(M, K, device=device), make_weight(2 * N, K, device)
    squares, factor = make_squares(x)
    out, out_peaks = poisoned(M, N, device=device), make_peaks(M, device=device)
    thin_linear(
        x, w, out, is_gated=True, squares_MQ=squares, epsilon=EPSILON, peaks_MA=peaks_of(x), out_peaks_MA=out_peaks,
        pdl=pdl,
    )  # fmt: skip
    gate, up = (rounded(x) @ wide(w).T * factor).view(M, N, 2).unbind(-1)
    assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE
    assert_peaks(out_peaks, out)


def check_residual(M: int, N: int, K: int, tiling: Tiling, device: torch.device, pdl: bool, repeats: int = 0) -> None:
    x, w, gain = numbers(M, K, device=device), make_weight(N, K, device), numbers(N, device=device)
    before, peaks = numbers(M, N, device=device), peaks_of(x)
    workspace = SplitWorkspace.create(N, M, 4, device)
    workspace.parts.fill_(float("nan"))

    def once() -> tuple[ResidualSum, Tensor]:
        squares = poisoned(M, tiling.num_squares(N), device=device, dtype=torch.float32)
        result = ResidualSum(before.clone(), gain, poisoned(M, N, device=device), squares)
        out_peaks = make_peaks(M, device=device)
        thin_linear(
            x, w, result, peaks_MA=peaks, out_peaks_MA=out_peaks, tiling=tiling, workspace=workspace, pdl=pdl
        )  # fmt: skip
        return result, out_peaks

    first, first_peaks = once()
    assert not workspace.arrived.any(), "counters must be zero again"
    assert relative_error(first.residual_MN, before.double() + rounded(x) @ wide(w).T) < TOLERANCE
    assert relative_error(first.gained_MN, first.residual_MN.double() * gain.double()) < TOLERANCE
    sums = first.residual_MN.double().square().sum(1)
    torch.testing.assert_close(first.squares_MQ.double().sum(1), sums, atol=0, rtol=1e-5)
    assert_peaks(first_peaks, first.gained_MN)
    for _ in range(repeats):
        again, again_peaks = once()
        assert torch.equal(again.residual_MN, first.residual_MN)
        assert torch.equal(again.gained_MN, first.gained_MN)
        assert torch.equal(again.squares_MQ, first.squares_MQ)
        assert torch.equal(again_peaks, first_peaks)


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
def test_residual(M: int, N: int, K: int, device: torch.device, pdl: bool) -> None:
    check_residual(M, N, K, choose_quantized_tiling(M, N, K, RESIDUAL), device, pdl)


@pytest.mark.parametrize(("M", "N", "K"), FULL)
def test_full_grid_repeats_its_bits(M: int, N: int, K: int, device: torch.device, pdl: bool) -> None:
    check_residual(M, N, K, choose_quantized_tiling(M, N, K, RESIDUAL), device, pdl, repeats=50)


@pytest.mark.parametrize("rows", [2, 16])
def test_a_row_has_the_same_bits_in_any_batch(rows: int, device: torch.device, pdl: bool) -> None:
    x, w = numbers(rows, 4096, device=device), make_weight(6144, 4096, device)
    tiling = choose_quantized_tiling(16, 6144, 4096, PLAIN)
    together, peaks = poisoned(rows, 6144, device=device), peaks_of(x)
    workspace = SplitWorkspace.create(6144, 16, 4, device)
    thin_linear(x, w, together, peaks_MA=peaks, tiling=tiling, workspace=workspace, pdl=pdl)
    for row in range(rows):
        alone, at = poisoned(1, 6144, device=device), slice(row, row + 1)
        thin_linear(x[at], w, alone, peaks_MA=peaks[at], tiling=tiling, workspace=workspace, pdl=pdl)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("M", "I"), [(1, 8), (7, 1536), (3, 1000), (2, 5000)])
@pytest.mark.parametrize("is_unscaled", [False, True])
def test_silu_mul_pairs(M: int, I: int, is_unscaled: bool, device: torch.device, pdl: bool) -> None:  # noqa: E741
    gate_up, out = numbers(M, 2 * I, device=device), QuantizedRows.empty(M, I, device)
    row_scales, scales = torch.rand(M, device=device) + 0.5, torch.rand(2 * I, device=device) + 0.5
    product = UnscaledProduct(gate_up, row_scales, scales)
    silu_mul_pairs(product if is_unscaled else gate_up, out, pdl=pdl)
    exact = gate_up.double() * (row_scales[:, None] * scales).double() if is_unscaled else gate_up.double()
    g, u = exact.view(M, I, 2).unbind(-1)
    expected = g * g.sigmoid() * u
    ours = out.values_MK.double() * out.scales_M.double()[:, None]
    assert relative_error(ours, expected) < 0.04, "e4m3 rounds by at most 1/16, on average by a fortieth"
    assert out.values_MK.float().abs().amax(1).eq(448).all(), "the largest number of a row is e4m3's largest"
    torch.testing.assert_close(out.scales_M.double() * 448, expected.abs().amax(1), atol=0, rtol=2**-8)


@pytest.mark.parametrize(("M", "N", "K"), [(3, 64, 128), (300, 256, 512)])
def test_products_of_many_rows(M: int, N: int, K: int, device: torch.device) -> None:
    x, w = numbers(M, K, device=device), make_weight(N, K, device)
    rows = QuantizedRows.empty(M, K, device)
    quantize(x, rows)
    expected = rounded(x) @ wide(w).T
    assert relative_error(scaled_linear(rows, w), expected) < TOLERANCE
    ones = torch.ones((), device=device)
    product = unscaled_linear(rows, w, ones, poisoned(M, N, device=device))
    ours = product.values_MN.double() * product.row_scales_M.double()[:, None] * product.scales_N.double()
    assert relative_error(ours, expected) < TOLERANCE
