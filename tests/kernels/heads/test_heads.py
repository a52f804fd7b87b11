"""Rotation against complex numbers, and both forms of placing heads against a statement in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.heads.kv_slots import KvSlots
from tensorweave.kernels.heads.native import NativePlaceHeads
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.heads.rope import rope
from tensorweave.kernels.weights import FP8, to_fp8
from tests.kernels.forms import FORMS, NATIVE, assert_close, needs_native, operations_of


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """[T, N, H] by the angles [T, H/2], as complex numbers in float64."""
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(
        torch.ones_like(angles.double()), angles.double()
    ).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 34)])
def test_rope_turns_pairs_as_complex_numbers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    T, _, H = shape
    x, angles = torch.randn(shape).to(dtype), torch.rand(T, H // 2) * 6
    ours = rope(x, torch.cat([angles.cos(), angles.sin()], -1))
    assert ours.dtype == dtype
    assert_close(ours, turn(x, angles), "reference")


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(70, 3, 2, 64), (1, 5, 1, 32), (3, 4, 4, 192)])
def test_place_heads(T: int, N: int, K: int, H: int, has_norms: bool, form: str, dtype: torch.dtype) -> None:
    P, num_blocks, epsilon = 8, 20, 1e-5
    place_heads = operations_of(form, dtype, H).place_heads
    assert isinstance(place_heads, NativePlaceHeads) == (form == "native")
    heads, cache = torch.randn(T, N + 2 * K, H).to(dtype), torch.zeros(num_blocks, 2 * K, P, H, dtype=dtype)
    angles, slots = torch.rand(T, H // 2) * 6, torch.randperm(num_blocks * P)[:T]
    norms = HeadNorms(torch.rand(H).to(dtype), torch.rand(H).to(dtype), epsilon) if has_norms else None

    exact = heads.double()
    if norms is not None:
        exact = exact / (exact.square().mean(-1, keepdim=True) + epsilon).sqrt()
        exact[:, :N] *= norms.query_H
        exact[:, N : N + K] *= norms.key_H
    exact[:, : N + K] = turn(exact[:, : N + K], angles)
    exact[:, N + K :] = heads[:, N + K :]
    exact_cache = torch.zeros(num_blocks, P, 2 * K, H, dtype=torch.float64)
    exact_cache.view(-1, 2 * K, H)[slots] = exact[:, N:]

    table = torch.cat([angles.cos(), angles.sin()], -1)
    queries = place_heads(heads, table, cache, KvSlots(slots, 2 * K, P), norms)
    assert_close(queries, exact[:, :N], form, factor=3)
    assert_close(cache, exact_cache.transpose(1, 2), form, factor=3)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("has_neighbours", [False, True])
@pytest.mark.parametrize(("H", "W"), [(64, 64), (64, 48), (32, 2), (128, 96)])
def test_part_of_each_head_is_rotated(H: int, W: int, has_neighbours: bool, form: str, dtype: torch.dtype) -> None:
    T, N, K, P, num_blocks = 5, 3, 2, 8, 4
    heads, cache = torch.randn(T, N + 2 * K, H).to(dtype), torch.zeros(num_blocks, 2 * K, P, H, dtype=dtype)
    angles, slots = torch.rand(T, W // 2) * 6, torch.randperm(num_blocks * P)[:T]
    exact = heads.double()
    turned = exact[:, : N + K, :W]
    paired = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if has_neighbours else turned
    paired = turn(paired, angles)
    exact[:, : N + K, :W] = paired.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if has_neighbours else paired
    exact_cache = torch.zeros(num_blocks, P, 2 * K, H, dtype=torch.float64)
    exact_cache.view(-1, 2 * K, H)[slots] = exact[:, N:]

    table, place_heads = torch.cat([angles.cos(), angles.sin()], -1), operations_of(form, dtype, H).place_heads
    queries = place_heads(heads, table, cache, KvSlots(slots, 2 * K, P), None, has_neighbours=has_neighbours)
    assert_close(queries, exact[:, :N], form, factor=3)
    assert_close(cache, exact_cache.transpose(1, 2), form, factor=3)


def test_slots_are_filled_and_nothing_else() -> None:
    cache, kv = torch.zeros(5, 4, 8, 3), torch.randn(3, 4, 3)
    slots = KvSlots(torch.tensor([2 * 8 + 7, 4 * 8, 0]), 4, 8)
    slots.write(kv, cache)
    assert torch.equal(cache[[2, 4, 0], :, [7, 0, 0]], kv)
    assert int((cache != 0).sum()) == kv.numel()


@needs_native
@pytest.mark.parametrize("dtype", NATIVE)
def test_a_cache_of_8_bit_floats_gets_the_nearest_of_what_another_gets(dtype: torch.dtype) -> None:
    T, N, K, P, H = 9, 2, 3, 4, 64
    place_heads = operations_of("native", dtype, H).place_heads
    heads = (torch.randn(T, N + 2 * K, H) * torch.logspace(-4, 3, H)).to(dtype)
    heads[0, -1, :12] = torch.tensor(
        [-0.0, 2**-10, 3 * 2**-10, 2**-9, 0.96875, 464, 480, -1e9, 1e-30, 17, 19, torch.nan]
    )
    angles, slots = torch.rand(T, H // 2) * 6, KvSlots(torch.randperm(5 * P)[:T], 2 * K, P)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    wide = torch.zeros(5, 2 * K, P, H, dtype=dtype)
    narrow = torch.zeros(5, 2 * K, P, H, dtype=torch.uint8).view(FP8)
    queries = [place_heads(heads.clone(), table, cache, slots, None) for cache in (wide, narrow)]
    assert torch.equal(queries[0], queries[1])
    torch.testing.assert_close(narrow.float(), to_fp8(wide).float(), rtol=0, atol=0, equal_nan=True)
