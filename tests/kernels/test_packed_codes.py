"""Codes in the order of GPU kernels: the same weights as before, for every form and for sizes that no block divides."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from tensorweave.kernels.grouped_float_weight import GroupedFloatWeight
from tensorweave.kernels.grouped_weight import GroupedWeight
from tensorweave.kernels.packed_codes import PackedCodes

SIZES = [(16, 128), (48, 256), (7, 136), (40, 8), (33, 520)]


def random_grouped(
    N: int, K: int, group: int, bits: Literal[4, 8], offsets: str | None, scale_type: torch.dtype = torch.float16,
    dtype: torch.dtype = torch.bfloat16, device: Any = "cpu",
) -> GroupedWeight:  # fmt: skip
    """`offsets`: None, "whole" (zero points) or "any"."""
    G = -(-K // group)
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device=device)
    scales = (torch.rand(N, G, device=device) + 0.5).mul(0.01).to(scale_type)
    zero = 1 << (bits - 1)
    minimums = None
    if offsets == "whole":
        minimums = scales.float() * torch.randint(-zero, zero, (N, G), device=device)
    elif offsets == "any":
        minimums = torch.randn(N, G, device=device) * 0.01
        scales = torch.where(torch.rand(N, G, device=device) < 0.1, torch.zeros_like(scales), scales)
    return GroupedWeight.of_codes(codes, scales, minimums, group_size=group, bits=bits, zero=zero, dtype=dtype)


def random_floats(N: int, K: int, group: int, kind: Literal["e4m3", "e2m1"], device: Any = "cpu") -> GroupedFloatWeight:
    scales = torch.rand(N, -(-K // group), device=device) * 0.02
    if kind == "e4m3":
        values = torch.randn(N, K, device=device).mul(30).to(torch.float8_e4m3fn)
        return GroupedFloatWeight.of_fp8(values, scales, group_size=group, dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (N, -(-K // 2)), dtype=torch.uint8, device=device)
    return GroupedFloatWeight(codes, scales, K, min(group, K), kind, torch.bfloat16)


@pytest.mark.parametrize(("N", "K"), SIZES)
@pytest.mark.parametrize("group", [32, 64, 128, 10000])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [None, "whole", "any"])
def test_integers(N: int, K: int, group: int, bits: Literal[4, 8], offsets: str | None) -> None:
    weight = random_grouped(N, K, min(group, K), bits, offsets)
    packed = PackedCodes.of(weight)
    torch.testing.assert_close(packed.wide_rows(), weight.wide_rows(), rtol=1e-5, atol=1e-7)
    assert packed.form.numbers == (torch.float32 if offsets == "any" else torch.float16)
    if N > 16:
        torch.testing.assert_close(packed.outputs_from(16).wide_rows(), packed.wide_rows()[16:])


@pytest.mark.parametrize(("N", "K"), SIZES)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
def test_floats(N: int, K: int, group: int, kind: Literal["e4m3", "e2m1"]) -> None:
    weight = random_floats(N, K, min(group, K), kind)
    packed = PackedCodes.of(weight)
    assert torch.equal(packed.wide_rows(), weight.wide_rows())


def test_zero_points_take_two_bytes() -> None:
    packed = PackedCodes.of(random_grouped(32, 256, 128, 4, "whole", torch.bfloat16))
    assert packed.form.numbers.itemsize == 2
    assert packed.records.shape == (2, 2, 1024 + 64)


def test_groups_of_16_have_no_form() -> None:
    assert not PackedCodes.can_pack(random_grouped(16, 64, 16, 4, None))
