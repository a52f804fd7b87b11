"""Native products with 8-bit floats against the reference, and against the products of the dequantized weights."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.linear.reference import GroupedFloatLinear, make_linear
from tensorweave.kernels.linear.scaled import GroupSumLinear, ScaledLinear, make_scaled
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.operations import choose_operations
from tensorweave.kernels.weights import FP8, GroupedFloatWeight, QuantizedWeight, Weight, quantize_weight

N, K = 70, 320
OPERATIONS = choose_operations(torch.device("cpu"), torch.float32, 64)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_groups(size: int, dtype: torch.dtype = torch.float32) -> GroupedFloatWeight:
    scales = random(N, -(-K // size), seed=2).abs() + 0.1
    return GroupedFloatWeight.of_fp8((random(N, K, seed=1) * 30).to(FP8), scales, group_size=size, dtype=dtype)


def quantized(dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    return quantize_weight(random(N, K, seed=3).to(dtype))


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("weight", [quantized(), in_groups(128), in_groups(64)], ids=["output", "128", "64"])
def test_products_are_the_references(weight: QuantizedWeight | GroupedFloatWeight, num_rows: int) -> None:
    x, bias = random(num_rows, K, seed=4), random(N, seed=5)
    linear = make_scaled(weight, bias, OPERATIONS.make_linear)
    assert linear is not None
    expected = make_linear(weight, bias).to_float32(x)
    assert (linear.to_float32(x) - expected).abs().max() < 2e-6 * expected.abs().max()
    assert torch.equal(linear(x), linear.to_float32(x))
    if isinstance(weight, GroupedFloatWeight):
        exact = x.double() @ weight.rows().double().T + bias
        assert (linear(x) - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.skipif(load_native(torch.float32) is None, reason="no native kernels here")
@pytest.mark.parametrize("weight", [quantized(), in_groups(128)], ids=["output", "128"])
def test_a_row_does_not_depend_on_its_batch(weight: Weight) -> None:
    x = random(9, K, seed=6)
    linear = OPERATIONS.make_linear(weight, None)
    assert isinstance(linear, ScaledLinear | GroupSumLinear)
    assert torch.equal(linear(x)[3:4], linear(x[3:4]))


def test_bfloat16_rows() -> None:
    x = random(3, K, seed=7).bfloat16()
    operations = choose_operations(torch.device("cpu"), torch.bfloat16, 64)
    for weight in (quantized(torch.bfloat16), in_groups(128, torch.bfloat16)):
        linear, expected = operations.make_linear(weight, None), make_linear(weight)
        difference = (linear.to_float32(x) - expected.to_float32(x)).abs().max()
        assert difference < 1e-5 * expected.to_float32(x).abs().max()
        assert linear(x).dtype == torch.bfloat16


def test_small_groups_go_to_the_reference() -> None:
    assert isinstance(OPERATIONS.make_linear(in_groups(32), None), GroupedFloatLinear)
