"""Products of 1 to 16 rows with codes in groups, by the CUDA C++ kernel for Hopper: each form and epilogue against
float64; a row's bits in any batch; full-size grids repeated; the weight dequantized."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

pytest.importorskip("triton")

from tensorweave.kernels.linear.cuda_grouped import MAX_GROUPED_ROWS, dequantize, grouped_few_linear, grouped_linear
from tensorweave.kernels.linear.triton_thin import ResidualSum, thin_linear
from tensorweave.kernels.packed_codes import PackedCodes
from tests.kernels.linear.test_triton_thin import EPSILON, TOLERANCE, make_squares, numbers, poisoned, relative_error
from tests.kernels.test_packed_codes import random_floats, random_grouped

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

SMALL = [(1, 48, 64), (1, 70, 576), (2, 96, 1536), (7, 40, 648), (8, 16, 8192), (9, 200, 512), (16, 130, 960)]
FULL = [(1, 4096, 4096), (1, 28672, 4096), (8, 4096, 14336), (16, 28672, 4096)]
Bits = Literal[4, 8]


def pack(
    N: int, K: int, device: Any, *, bits: Bits = 4, group: int = 128, offsets: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedCodes:  # fmt: skip
    return PackedCodes.of(random_grouped(N, K, min(group, K), bits, offsets, dtype=dtype, device=device))


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 100000])
@pytest.mark.parametrize("offsets", [None, "whole", "any"])
def test_integers(M: int, N: int, K: int, bits: Bits, group: int, offsets: str | None, device: torch.device) -> None:
    x, weight = numbers(M, K, device=device), pack(N, K, device, bits=bits, group=group, offsets=offsets)
    out = poisoned(M, N, device=device)
    grouped_few_linear(x, weight, out, pdl=True)
    assert relative_error(out, x.double() @ weight.wide_rows().double().T) < TOLERANCE


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
@pytest.mark.parametrize("group", [32, 128])
def test_floats(M: int, N: int, K: int, kind: Literal["e4m3", "e2m1"], group: int, device: torch.device) -> None:
    x, weight = numbers(M, K, device=device), PackedCodes.of(random_floats(N, K, min(group, K), kind, device))
    out = poisoned(M, N, device=device, dtype=torch.float32)
    grouped_few_linear(x, weight, out, pdl=True)
    assert relative_error(out, x.double() @ weight.wide_rows().double().T) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_bias_and_norm(bits: Bits, dtype: torch.dtype, device: torch.device) -> None:
    M, N, K = 11, 72, 640
    x, bias = numbers(M, K, device=device).to(dtype), numbers(N, device=device).to(dtype)
    weight = pack(N, K, device, bits=bits, offsets="whole", dtype=dtype)
    squares, factor = make_squares(x)
    out = poisoned(M, N, device=device, dtype=dtype)
    grouped_few_linear(x, weight, out, bias_N=bias, squares_MQ=squares, epsilon=EPSILON, pdl=True)
    assert relative_error(out, x.double() @ weight.wide_rows().double().T * factor + bias.double()) < TOLERANCE


@pytest.mark.parametrize(("M", "N", "K"), [*SMALL, (5, 28672, 256)])
@pytest.mark.parametrize("bits", [4, 8])
def test_gated(M: int, N: int, K: int, bits: Bits, device: torch.device) -> None:
    x, weight = numbers(M, K, device=device) * 0.3, pack(2 * N, K, device, bits=bits)
    squares, factor = make_squares(x)
    out = poisoned(M, N, device=device)
    thin_linear(x, weight, out, is_gated=True, squares_MQ=squares, epsilon=EPSILON, pdl=True)
    both = x.double() @ weight.wide_rows().double().T * factor
    gate, up = both[:, 0::2], both[:, 1::2]
    assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE


def check_residual(M: int, N: int, K: int, device: torch.device, offsets: str | None, repeats: int = 0) -> None:
    x, weight = numbers(M, K, device=device), pack(N, K, device, offsets=offsets)
    before, gain = numbers(M, N, device=device), numbers(N, device=device)

    def once() -> ResidualSum:
        squares = poisoned(M, -(-N // 16), device=device, dtype=torch.float32)
        result = ResidualSum(before.clone(), gain, poisoned(M, N, device=device), squares)
        thin_linear(x, weight, result, pdl=True)
        return result

    first = once()
    expected = before.double() + x.double() @ weight.wide_rows().double().T
    assert relative_error(first.residual_MN, expected) < TOLERANCE
    assert relative_error(first.gained_MN, first.residual_MN.double() * gain.double()) < TOLERANCE
    sums = first.residual_MN.double().square().sum(1)
    torch.testing.assert_close(first.squares_MQ.double().sum(1), sums, atol=0, rtol=1e-5)
    for _ in range(repeats):
        again = once()
        assert torch.equal(again.residual_MN, first.residual_MN)
        assert torch.equal(again.squares_MQ, first.squares_MQ)


@pytest.mark.parametrize(("M", "N", "K"), SMALL)
@pytest.mark.parametrize("offsets", [None, "whole"])
def test_residual(M: int, N: int, K: int, offsets: str | None, device: torch.device) -> None:
    check_residual(M, N, K, device, offsets)


@pytest.mark.parametrize(("M", "N", "K"), FULL)
def test_full_grids_repeat_their_bits(M: int, N: int, K: int, device: torch.device) -> None:
    check_residual(M, N, K, device, "whole", repeats=50)


def test_a_row_has_the_same_bits_in_any_batch(device: torch.device) -> None:
    x, weight = numbers(40, 4096, device=device), pack(6144, 4096, device)
    together = poisoned(40, 6144, device=device)
    grouped_linear(x, weight, together, pdl=True)
    for rows in (slice(0, 1), slice(3, 5), slice(5, 13), slice(7, 7 + MAX_GROUPED_ROWS), slice(30, 40)):
        out = poisoned(rows.stop - rows.start, 6144, device=device)
        grouped_few_linear(x[rows].contiguous(), weight, out, pdl=True)
        assert torch.equal(out, together[rows])


@pytest.mark.parametrize(("N", "K"), [(48, 128), (70, 648), (4096, 4096)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [None, "whole", "any"])
def test_dequantize(N: int, K: int, bits: Bits, offsets: str | None, device: torch.device) -> None:
    weight = pack(N, K, device, bits=bits, offsets=offsets)
    torch.testing.assert_close(dequantize(weight), weight.rows(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
def test_dequantize_floats(kind: Literal["e4m3", "e2m1"], device: torch.device) -> None:
    weight = PackedCodes.of(random_floats(96, 520, 32, kind, device))
    assert torch.equal(dequantize(weight), weight.rows())
