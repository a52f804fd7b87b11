"""Native products with integers in groups, against float64 and against rows one by one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tensorweave.kernels.linear.grouped import PackedGroupedLinear
from tensorweave.kernels.linear.reference import GroupedLinear, Linear
from tensorweave.kernels.native.library import use_threads
from tensorweave.kernels.weights import GroupedWeight
from tests.kernels.forms import NATIVE, operations_of

Bits = Literal[4, 8]
RowBits = Literal[8, 16]


def random_weight(
    N: int,
    K: int,
    size: int,
    bits: Bits = 4,
    *,
    has_minimums: bool = False,
    is_half: bool = True,
    row_bits: RowBits = 16,
    dtype: torch.dtype = torch.float32,
) -> GroupedWeight:
    """Whose products with rows of normal numbers are about 1."""
    G, scale_type = -(-K // size), torch.float16 if is_half else torch.float32
    return GroupedWeight.of_codes(
        torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8),
        (torch.rand(N, G) * 4 / K**0.5 / (1 << bits)).to(scale_type),
        (torch.randn(N, G) / K**0.5).to(scale_type) if has_minimums else None,
        group_size=size,
        bits=bits,
        zero=8 if bits == 4 else 128,
        dtype=dtype,
        row_bits=row_bits,
    )


def native_linear(weight: GroupedWeight, bias: torch.Tensor | None = None) -> PackedGroupedLinear:
    linear = operations_of("native", weight.dtype).make_linear(weight, bias)
    assert isinstance(linear, PackedGroupedLinear)
    return linear


def exact(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    return x.double() @ weight.wide_rows().double().T


def error_bound(x: torch.Tensor, weight: GroupedWeight, row_bits: RowBits) -> torch.Tensor:
    """[M, N]: every input is rounded by at most half a step; a step is the largest input of its block of at most 64,
    and so of the row, divided by 127 or 127 * 256. Beside it, float32's own errors."""
    step = x.double().abs().amax(1, keepdim=True) / (127 if row_bits == 8 else 127 * 256)
    magnitudes = weight.wide_rows().double().abs()
    return step / 2 * magnitudes.sum(1) + 1e-5 * (1 + x.double().abs() @ magnitudes.T)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("row_bits", [8, 16])
@pytest.mark.parametrize(("N", "K", "size"), [(33, 72, 16), (100, 320, 32), (64, 100, 1000), (40, 576, 128)])
@pytest.mark.parametrize("has_minimums", [False, True])
def test_products(
    N: int, K: int, size: int, has_minimums: bool, row_bits: RowBits, bits: Bits, dtype: torch.dtype
) -> None:
    weight = random_weight(
        N, K, size, bits, has_minimums=has_minimums, is_half=size != 32, row_bits=row_bits, dtype=dtype
    )
    bias = torch.randn(N).to(dtype)
    linear = native_linear(weight, bias)
    rows = torch.randn(30, K + 3).to(dtype)
    for M in (0, 1, 2, 5, 30):
        x = rows[:M, :K]  # rows with a stride
        wide = linear.to_float32(x)
        error = (wide.double() - exact(x, weight) - bias.double()).abs()
        assert (error <= error_bound(x, weight, row_bits)).all()
        assert torch.equal(linear(x), wide.to(dtype))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("row_bits", [8, 16])
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    row_bits: RowBits, bits: Bits, dtype: torch.dtype
) -> None:
    weight = random_weight(100, 288, 32, bits, has_minimums=True, row_bits=row_bits, dtype=dtype)
    linear, x = native_linear(weight), torch.randn(70, 288).to(dtype)
    whole = linear(x)
    for threads in (2, 3):
        assert use_threads(threads)
        for rows in (slice(0, 1), slice(3, 8), slice(11, 28), slice(0, 70)):
            assert torch.equal(linear(x[rows]), whole[rows])


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("row_bits", [8, 16])
def test_the_reference_rounds_rows_as_the_kernel_does(row_bits: RowBits, dtype: torch.dtype) -> None:
    weight = random_weight(48, 200, 40, 8, row_bits=row_bits, dtype=dtype)
    regrouped = weight.regrouped(8)  # of no size that the kernels take
    reference: Linear = operations_of("native", dtype).make_linear(regrouped, None)
    assert isinstance(reference, GroupedLinear)
    x = torch.randn(4, 200).to(dtype)
    assert ((reference.to_float32(x) - exact(x, weight)).abs() <= error_bound(x, weight, row_bits)).all()
    fine = random_weight(48, 200, 64, 8, row_bits=row_bits, dtype=dtype)
    ours, theirs = native_linear(fine).to_float32(x), GroupedLinear(fine, None).to_float32(x)
    if dtype == torch.float32:  # ties, which bfloat16 has, go either way on a CPU without fused multiply-adds
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ((ours - theirs).abs() <= error_bound(x, fine, row_bits)).all()


@pytest.mark.parametrize("row_bits", [8, 16])
def test_rows_of_zeros_of_tiny_and_of_huge_numbers(row_bits: RowBits) -> None:
    linear = native_linear(random_weight(40, 64, 32, has_minimums=True, row_bits=row_bits))
    x = torch.zeros(4, 64)
    x[1], x[2], x[3, 5] = 1e-42, 1e30, -1e30
    out = linear(x)
    assert not out[:2].any()
    assert out.isfinite().all()
    assert out[2:].any(1).all()


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("row_bits", [8, 16])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_results_nan(odd: float, row_bits: RowBits, dtype: torch.dtype) -> None:
    linear = native_linear(random_weight(40, 96, 32, row_bits=row_bits, dtype=dtype))
    x = torch.ones(2, 96, dtype=dtype)
    x[0, 70] = odd
    out = linear(x)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
