"""Floats in groups, matrices made of several forms, and inputs in another order: exact, whole and in parts."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.grouped_float_weight import E2M1_VALUES, GroupedFloatWeight
from tensorweave.kernels.grouped_weight import GroupedWeight, pack_nibbles
from tensorweave.kernels.linear.reference import make_linear
from tensorweave.kernels.operations import choose_operations
from tensorweave.kernels.weights import FP8, ReorderedWeight, StackedWeight, Weight, quantize_weight, stack_weights

N, K = 10, 96


ROWS_OF_16_BITS = 5e-5
"""How far off the largest result products with integers may be, which round the rows that they multiply."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8_in_groups(group_size: int, seed: int = 0, num_outputs: int = N) -> GroupedFloatWeight:
    scales = random(num_outputs, -(-K // group_size), seed=seed + 1).abs() + 0.1
    values = (random(num_outputs, K, seed=seed) * 3).to(FP8)
    return GroupedFloatWeight.of_fp8(values, scales, group_size=group_size, dtype=torch.float32)


def fp4_in_groups(seed: int = 0) -> GroupedFloatWeight:
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    scales = torch.exp2(torch.randint(-3, 4, (N, 3), generator=torch.Generator().manual_seed(seed)).float())
    return GroupedFloatWeight(pack_nibbles(codes), scales, K, 32, "e2m1", torch.float32)


def integers(seed: int = 0) -> GroupedWeight:
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return GroupedWeight.of_codes(codes, random(N, 3, seed=seed), group_size=32, bits=4, zero=8, dtype=torch.float32)


def test_fp8_values_times_the_scale_of_their_group() -> None:
    weight = fp8_in_groups(32)
    values = weight.codes.view(FP8).float()
    for column in (0, 31, 32, 95):
        assert torch.equal(weight.rows()[:, column], values[:, column] * weight.scales_NG[:, column // 32])


def test_fp4_codes_are_the_standards() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    weight = GroupedFloatWeight(pack_nibbles(codes), torch.tensor([[4.0]]), 16, 16, "e2m1", torch.float32)
    expected = [4 * value for value in E2M1_VALUES] + [-4 * value for value in E2M1_VALUES]
    assert weight.rows().tolist() == [expected]


def test_fp4_as_integers_is_the_same() -> None:
    weight = fp4_in_groups()
    assert torch.equal(weight.in_integers().rows(), weight.rows())


@pytest.mark.parametrize("columns", [range(32, 96), range(48, 80), range(8, 96)])
@pytest.mark.parametrize("weight", [fp8_in_groups(32), fp4_in_groups()], ids=["fp8", "fp4"])
def test_parts_of_floats_in_groups(weight: GroupedFloatWeight, columns: range) -> None:
    part = weight.outputs(range(2, 7)).inputs(columns)
    assert torch.equal(part.rows(), weight.rows()[2:7, columns.start : columns.stop])


@pytest.mark.parametrize(
    "parts",
    [
        [fp8_in_groups(32), fp8_in_groups(48, seed=5)],
        [fp4_in_groups(1), fp4_in_groups(2)],
        [integers(1), integers(2)],
        [quantize_weight(random(4, K)), quantize_weight(random(6, K, seed=2))],
        [random(3, K), random(5, K)],
        [integers(1), random(7, K), fp8_in_groups(32), quantize_weight(random(4, K))],
    ],
    ids=["fp8 groups", "fp4", "integers", "fp8", "plain", "mixed"],
)
def test_stacks_keep_every_weight(parts: list[Weight]) -> None:
    whole = stack_weights(parts)
    expected = torch.cat([part if isinstance(part, torch.Tensor) else part.rows() for part in parts])
    assert torch.equal(whole if isinstance(whole, torch.Tensor) else whole.rows(), expected)
    assert isinstance(whole, StackedWeight) == (len({type(part) for part in parts}) > 1)


@pytest.mark.parametrize("weight", [fp8_in_groups(32), fp4_in_groups(), integers()], ids=["fp8", "fp4", "integers"])
def test_products_are_those_of_the_dequantized_weights(weight: GroupedFloatWeight | GroupedWeight) -> None:
    x, bias = random(7, K, seed=3), random(N, seed=4)
    linear = make_linear(weight, bias)
    expected = x.double() @ weight.rows().double().T + bias
    bound = ROWS_OF_16_BITS if isinstance(weight, GroupedWeight) else 1e-6
    assert (linear.to_float32(x) - expected).abs().max() < bound * expected.abs().max()
    assert torch.equal(linear(x), linear.to_float32(x))


def test_a_stack_of_forms_multiplies_part_by_part() -> None:
    parts = [integers(1), random(7, K), fp8_in_groups(32)]
    x, bias = random(3, K, seed=3), random(27, seed=4)
    operations = choose_operations(torch.device("cpu"), torch.float32, 64)
    for make in (make_linear, operations.make_linear):
        product = make(stack_weights(parts), bias)(x)
        expected = x.double() @ stack_weights(parts).rows().double().T + bias  # type: ignore[union-attr]
        assert (product - expected).abs().max() < ROWS_OF_16_BITS * expected.abs().max()


@pytest.mark.parametrize("padding", [0, 8])
def test_inputs_in_another_order(padding: int) -> None:
    order = torch.cat([torch.randperm(K, generator=torch.Generator().manual_seed(1)), torch.full((padding,), K)])
    codes = torch.randint(0, 256, (N, K + padding), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    inner = GroupedWeight.of_codes(
        codes, random(N, -(-(K + padding) // 8)), group_size=8, bits=8, zero=128, dtype=torch.float32
    )
    weight = ReorderedWeight(inner, order, K)
    x = random(5, K)
    for column, place in ((0, 0), (50, 50)):
        assert torch.equal(weight.rows()[:, order[column]], inner.rows()[:, place])
    expected = x.double() @ weight.rows().double().T
    assert (make_linear(weight)(x) - expected).abs().max() < ROWS_OF_16_BITS * expected.abs().max()
    double = stack_weights([weight, weight])
    assert isinstance(double, ReorderedWeight)
    assert torch.equal(double.rows(), torch.cat([weight.rows(), weight.rows()]))
