"""Products of many rows by the kernel for Hopper against float64, with what follows them; equal bits at full size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.linear.cuda_wide import PlacedHeads, num_wide_squares, wide_linear
from tensorweave.kernels.linear.triton_thin import ResidualSum

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
EPSILON = 1e-5

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 256, 64), (300, 1040, 1000), (1000, 4096, 4096), (777, 768, 512)]


def error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def numbers(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def poisoned(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), device=like.device, dtype=like.dtype)


class Case:
    """x, a weight and their product in float64; `factor_M1` is 1 / rms of the rows by `squares_MQ`."""

    def __init__(self, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
        self.x = numbers(M, K, device=device, dtype=dtype)
        self.weight = numbers(N, K, device=device, dtype=dtype, scale=K**-0.5)
        self.squares_MQ = torch.rand(M, 5, device=device) * K
        self.product = self.x.double() @ self.weight.double().T
        self.factor_M1 = torch.rsqrt(self.squares_MQ.double().sum(1, keepdim=True) / K + EPSILON)

    def expected(self, is_scaled: bool) -> Tensor:
        return self.product * self.factor_M1 if is_scaled else self.product

    def squares(self, is_scaled: bool) -> Tensor | None:
        return self.squares_MQ if is_scaled else None


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_product(M: int, N: int, K: int, dtype: torch.dtype, is_scaled: bool, hopper: torch.device) -> None:
    case = Case(M, N, K, dtype, hopper)
    out = poisoned(M, N, like=case.x)
    wide_linear(case.x, case.weight, out, squares_MQ=case.squares(is_scaled), epsilon=EPSILON)
    assert error(out, case.expected(is_scaled)) < TOLERANCE[dtype]


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_gated_product(M: int, N: int, K: int, dtype: torch.dtype, is_scaled: bool, hopper: torch.device) -> None:
    case = Case(M, N, K, dtype, hopper)
    out = poisoned(M, N // 2, like=case.x)
    wide_linear(case.x, case.weight, out, is_gated=True, squares_MQ=case.squares(is_scaled), epsilon=EPSILON)
    expected = case.expected(is_scaled)
    assert error(out, F.silu(expected[:, 0::2]) * expected[:, 1::2]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_sum_with_the_residual(M: int, N: int, K: int, dtype: torch.dtype, hopper: torch.device) -> None:
    case = Case(M, N, K, dtype, hopper)
    residual, gain = numbers(M, N, device=hopper, dtype=dtype), numbers(N, device=hopper, dtype=dtype)
    expected = case.product + residual.double()
    gained = poisoned(M, N, like=case.x)
    squares = torch.full((M, num_wide_squares(N)), float("nan"), device=hopper)
    wide_linear(case.x, case.weight, ResidualSum(residual, gain, gained, squares))
    assert error(residual, expected) < TOLERANCE[dtype]
    assert error(gained, expected * gain.double()) < 2 * TOLERANCE[dtype]
    assert error(squares.sum(1), residual.double().square().sum(1)) < 1e-5


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K", "H", "P", "D"),
    [(300, 4, 2, 128, 32, 512), (333, 9, 3, 64, 16, 576), (200, 3, 1, 128, 128, 1000), (1, 2, 1, 64, 8, 64)],
    ids=str,
)
def test_placed_heads(
    M: int, N: int, K: int, H: int, P: int, D: int, dtype: torch.dtype, is_scaled: bool, hopper: torch.device
) -> None:
    case = Case(M, (N + 2 * K) * H, D, dtype, hopper)
    positions = torch.randint(0, 500, (M,), device=hopper, dtype=torch.int32)
    angles = torch.rand(500, H // 2, device=hopper) * 6
    rope = torch.cat([angles.cos(), angles.sin()], -1)
    num_blocks = -(-M // P) + 1
    slots = torch.randperm(num_blocks * P, device=hopper)[:M].int()
    slots[5::7] = -1
    heads = poisoned(M, N + 2 * K, H, like=case.x)
    cache = torch.zeros(num_blocks, 2 * K, P, H, device=hopper, dtype=dtype)
    placed = PlacedHeads(heads, cache, slots, positions, rope)
    wide_linear(case.x, case.weight, placed, squares_MQ=case.squares(is_scaled), epsilon=EPSILON)
    expected = case.expected(is_scaled).view(M, -1, H)
    cos, sin = rope[positions.long(), None].double().chunk(2, -1)
    left, right = expected[:, : N + K].chunk(2, -1)
    rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    assert error(heads[:, :N], rotated[:, :N]) < TOLERANCE[dtype]
    expected_cache = torch.zeros(cache.shape, device=hopper, dtype=torch.float64)
    kept = slots[slots >= 0].long()
    expected_cache[kept // P, :, kept % P] = torch.cat([rotated[:, N:], expected[:, N + K :]], 1)[slots >= 0]
    assert error(cache, expected_cache) < TOLERANCE[dtype]
    assert torch.equal(cache != 0, expected_cache != 0)


def test_a_row_has_the_same_bits_in_any_batch(hopper: torch.device) -> None:
    case = Case(1000, 4096, 1024, torch.bfloat16, hopper)
    whole, part = poisoned(1000, 4096, like=case.x), poisoned(130, 4096, like=case.x)
    wide_linear(case.x, case.weight, whole)
    wide_linear(case.x[300:430].contiguous(), case.weight, part)
    assert torch.equal(whole[300:430], part)


def test_full_size_repeats_its_bits(hopper: torch.device) -> None:
    case = Case(8192, 28672, 4096, torch.bfloat16, hopper)
    first = poisoned(8192, 14336, like=case.x)
    wide_linear(case.x, case.weight, first, is_gated=True)
    for _ in range(20):
        again = poisoned(8192, 14336, like=case.x)
        wide_linear(case.x, case.weight, again, is_gated=True)
        assert torch.equal(again, first)
