"""Products of few rows against float64: each epilogue, one row to 128, sizes that no block divides; equal bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.linear.thin_tiling import PLAIN, RESIDUAL, Tiling, choose_tiling
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs, swiglu_linear
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.weights import interleave_gate_up

pytestmark = pytest.mark.gpu

TOLERANCE = 6e-3  # relative error of the whole result in the Frobenius norm; bfloat16 rounds with 2⁻⁹ at most
EPSILON = 1e-5
SMALL = [(1, 48, 576), (1, 70, 1000), (2, 96, 576), (17, 200, 520), (64, 128, 512)]
FULL = [(1, 4096, 4096), (1, 4096, 14336), (5, 4096, 4096), (33, 4096, 14336), (128, 4096, 4096)]


def poisoned(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def numbers(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


def make_squares(x: Tensor, parts: int = 4) -> tuple[Tensor, Tensor]:
    """Sums of squares of some residual that x came from, and the factor that a product must apply."""
    squares = torch.rand(len(x), parts, device=x.device) * x.shape[1]
    return squares, (squares.double().sum(1, keepdim=True) / x.shape[1] + EPSILON).rsqrt()


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("has_bias", [False, True])
def test_plain(M: int, N: int, K: int, has_bias: bool, device: torch.device, pdl: bool) -> None:
    x, w, bias = numbers(M, K, device=device), numbers(N, K, device=device), numbers(N, device=device)
    squares, factor = make_squares(x)
    out = poisoned(M, N, device=device)
    thin_linear(
        x, w, out, bias_N=bias if has_bias else None, squares_MQ=squares, epsilon=EPSILON,
        workspace=SplitWorkspace.create(N, M, 4, device), pdl=pdl,
    )  # fmt: skip
    expected = x.double() @ w.double().T * factor + (bias.double() if has_bias else 0)
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_gated(M: int, N: int, K: int, is_scaled: bool, device: torch.device, pdl: bool) -> None:
    x, gate, up = numbers(M, K, device=device), *(numbers(N, K, device=device) * 0.05 for _ in range(2))
    squares, factor = make_squares(x)
    out = poisoned(M, N, device=device)
    thin_linear(
        x, interleave_gate_up(gate, up), out, is_gated=True, squares_MQ=squares if is_scaled else None, epsilon=EPSILON,
        pdl=pdl,
    )  # fmt: skip
    scale = factor if is_scaled else 1
    g, u = x.double() @ gate.double().T * scale, x.double() @ up.double().T * scale
    assert relative_error(out, g * g.sigmoid() * u) < TOLERANCE


def check_residual(M: int, N: int, K: int, tiling: Tiling, device: torch.device, pdl: bool, repeats: int = 0) -> None:
    x, w, gain = numbers(M, K, device=device), numbers(N, K, device=device), numbers(N, device=device)
    before = numbers(M, N, device=device)
    workspace = SplitWorkspace.create(N, M, 4, device)
    workspace.parts.fill_(float("nan"))

    def once() -> ResidualSum:
        squares = poisoned(M, tiling.num_squares(N), device=device, dtype=torch.float32)
        result = ResidualSum(before.clone(), gain, poisoned(M, N, device=device), squares)
        thin_linear(x, w, result, tiling=tiling, workspace=workspace, pdl=pdl)
        return result

    first = once()
    assert not workspace.arrived.any(), "counters must be zero again"
    expected = before.double() + x.double() @ w.double().T
    assert relative_error(first.residual_MN, expected) < TOLERANCE
    assert relative_error(first.gained_MN, first.residual_MN.double() * gain.double()) < TOLERANCE
    sums = first.residual_MN.double().square().sum(1)
    torch.testing.assert_close(first.squares_MQ.double().sum(1), sums, atol=0, rtol=1e-5)
    for _ in range(repeats):
        again = once()
        assert torch.equal(again.residual_MN, first.residual_MN)
        assert torch.equal(again.gained_MN, first.gained_MN)
        assert torch.equal(again.squares_MQ, first.squares_MQ)


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
def test_residual(M: int, N: int, K: int, device: torch.device, pdl: bool) -> None:
    check_residual(M, N, K, choose_tiling(M, N, K, RESIDUAL), device, pdl)


@pytest.mark.parametrize(("M", "N", "K"), FULL)
def test_full_grid_repeats_its_bits(M: int, N: int, K: int, device: torch.device, pdl: bool, gpu_only: None) -> None:
    check_residual(M, N, K, choose_tiling(M, N, K, RESIDUAL), device, pdl, repeats=50)


@pytest.mark.parametrize("rows", [2, 16])
def test_a_row_has_the_same_bits_in_any_batch(rows: int, device: torch.device, pdl: bool, gpu_only: None) -> None:
    x, w = numbers(rows, 4096, device=device), numbers(6144, 4096, device=device)
    tiling = choose_tiling(16, 6144, 4096, PLAIN)
    together = poisoned(rows, 6144, device=device)
    workspace = SplitWorkspace.create(6144, 16, 4, device)
    thin_linear(x, w, together, tiling=tiling, workspace=workspace, pdl=pdl)
    for row in range(rows):
        alone = poisoned(1, 6144, device=device)
        thin_linear(x[row : row + 1], w, alone, tiling=tiling, workspace=workspace, pdl=pdl)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("M", "I", "K"), [(1, 128, 64), (200, 384, 192), (130, 136, 576)])
def test_swiglu_of_many_rows(M: int, I: int, K: int, device: torch.device, gpu_only: None) -> None:  # noqa: E741
    x, gate, up = numbers(M, K, device=device), *(numbers(I, K, device=device) * 0.05 for _ in range(2))
    out = poisoned(M, I, device=device)
    swiglu_linear(x, interleave_gate_up(gate, up), out)
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    assert relative_error(out, g * g.sigmoid() * u) < TOLERANCE


@pytest.mark.parametrize(("M", "I"), [(1, 5), (7, 1536), (3, 1000)])
def test_silu_mul_pairs(M: int, I: int, device: torch.device, pdl: bool) -> None:  # noqa: E741
    gate_up, out = numbers(M, 2 * I, device=device), poisoned(M, I, device=device)
    silu_mul_pairs(gate_up, out, pdl=pdl)
    g, u = gate_up.double().view(M, I, 2).unbind(-1)
    assert relative_error(out, g * g.sigmoid() * u) < TOLERANCE


def test_a_large_swiglu_repeats_its_bits(device: torch.device, gpu_only: None) -> None:
    x, w = numbers(2048, 4096, device=device), numbers(28672, 4096, device=device) * 0.02
    first, again = (poisoned(2048, 14336, device=device) for _ in range(2))
    swiglu_linear(x, w, first)
    for _ in range(20):
        again.fill_(float("nan"))
        swiglu_linear(x, w, again)
        assert torch.equal(again, first)
