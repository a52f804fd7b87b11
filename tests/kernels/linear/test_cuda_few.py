"""Products of 1 to 16 rows by the CUDA C++ kernel for Hopper: each epilogue against float64; a row's bits in any batch;
full-size grids repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.linear.cuda_few import FEW_OUTPUTS, MAX_FEW_ROWS
from tensorweave.kernels.linear.thin_tiling import FEW_TILING, PLAIN, choose_tiling
from tensorweave.kernels.linear.triton_thin import ResidualSum, thin_linear
from tensorweave.kernels.weights import interleave_gate_up
from tests.kernels.linear.test_triton_thin import EPSILON, TOLERANCE, make_squares, numbers, poisoned, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

SMALL = [(1, 48, 64), (1, 70, 576), (2, 96, 1536), (7, 40, 640), (8, 16, 8192), (9, 200, 512), (16, 130, 960)]
FULL = [(1, 4096, 4096), (1, 4096, 14336), (8, 4096, 14336), (16, 4096, 4096)]


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain(M: int, N: int, K: int, has_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    x, w, bias = numbers(M, K, device=device), numbers(N, K, device=device), numbers(N, device=device)
    squares, factor = make_squares(x)
    out = poisoned(M, N, device=device, dtype=dtype)
    thin_linear(
        x, w, out, bias_N=bias if has_bias else None, squares_MQ=squares, epsilon=EPSILON, tiling=FEW_TILING, pdl=True
    )
    expected = x.double() @ w.double().T * factor + (bias.double() if has_bias else 0)
    assert relative_error(out, expected) < (TOLERANCE if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_gated(M: int, N: int, K: int, is_scaled: bool, device: torch.device) -> None:
    x, gate, up = numbers(M, K, device=device), *(numbers(N, K, device=device) * 0.05 for _ in range(2))
    squares, factor = make_squares(x)
    out = poisoned(M, N, device=device)
    thin_linear(
        x, interleave_gate_up(gate, up), out, is_gated=True, squares_MQ=squares if is_scaled else None, epsilon=EPSILON,
        tiling=FEW_TILING,
    )  # fmt: skip
    scale = factor if is_scaled else 1
    g, u = x.double() @ gate.double().T * scale, x.double() @ up.double().T * scale
    assert relative_error(out, g * g.sigmoid() * u) < TOLERANCE


def add(x: Tensor, w: Tensor, before: Tensor, gain: Tensor) -> ResidualSum:
    (M, N), device = before.shape, x.device
    squares = poisoned(M, -(-N // FEW_OUTPUTS), device=device, dtype=torch.float32)
    result = ResidualSum(before.clone(), gain, poisoned(M, N, device=device), squares)
    thin_linear(x, w, result, tiling=FEW_TILING, pdl=True)
    return result


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
def test_residual(M: int, N: int, K: int, device: torch.device) -> None:
    x, w, gain, before = (numbers(*shape, device=device) for shape in ((M, K), (N, K), (N,), (M, N)))
    result = add(x, w, before, gain)
    assert relative_error(result.residual_MN, before.double() + x.double() @ w.double().T) < TOLERANCE
    assert relative_error(result.gained_MN, result.residual_MN.double() * gain.double()) < TOLERANCE
    sums = result.residual_MN.double().square().sum(1)
    torch.testing.assert_close(result.squares_MQ.double().sum(1), sums, atol=0, rtol=1e-5)


@pytest.mark.parametrize(("M", "N", "K"), FULL)
def test_full_grid_repeats_its_bits(M: int, N: int, K: int, device: torch.device) -> None:
    x, w, gain, before = (numbers(*shape, device=device) for shape in ((M, K), (N, K), (N,), (M, N)))
    first = add(x, w, before, gain)
    assert relative_error(first.residual_MN, before.double() + x.double() @ w.double().T) < TOLERANCE
    for _ in range(50):
        again = add(x, w, before, gain)
        assert torch.equal(again.residual_MN, first.residual_MN)
        assert torch.equal(again.gained_MN, first.gained_MN)
        assert torch.equal(again.squares_MQ, first.squares_MQ)


@pytest.mark.parametrize(("N", "K"), [(6144, 4096), (4096, 14336), (960, 576)])
def test_a_row_has_the_same_bits_in_any_batch(N: int, K: int, device: torch.device) -> None:
    x, w, gain = numbers(MAX_FEW_ROWS, K, device=device), numbers(N, K, device=device), numbers(N, device=device)
    before, squares = numbers(MAX_FEW_ROWS, N, device=device), make_squares(x)[0]
    together, sums = poisoned(MAX_FEW_ROWS, N, device=device), add(x, w, before, gain)
    thin_linear(x, w, together, squares_MQ=squares, epsilon=EPSILON, tiling=FEW_TILING, pdl=True)
    for rows in (slice(0, 1), slice(3, 5), slice(5, 13), slice(7, 16)):
        out, mine = poisoned(rows.stop - rows.start, N, device=device), x[rows].contiguous()
        thin_linear(mine, w, out, squares_MQ=squares[rows].contiguous(), epsilon=EPSILON, tiling=FEW_TILING, pdl=True)
        assert torch.equal(out, together[rows])
        some = add(mine, w, before[rows].contiguous(), gain)
        assert torch.equal(some.residual_MN, sums.residual_MN[rows])
        assert torch.equal(some.gained_MN, sums.gained_MN[rows])
        assert torch.equal(some.squares_MQ, sums.squares_MQ[rows])


def test_the_kernel_is_chosen_for_2_to_16_rows() -> None:
    assert {choose_tiling(rows, 4096, 4096, PLAIN, has_few=True) for rows in (2, 8, 16)} == {FEW_TILING}
    for rows, inputs, has_few in ((1, 4096, True), (17, 4096, True), (2, 1000, True), (2, 4096, False)):
        assert choose_tiling(rows, 4096, inputs, PLAIN, has_few=has_few) != FEW_TILING
