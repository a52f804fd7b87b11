"""Norm, rotation and KV store against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tensorweave.kernels.heads.triton import rope_store
from tensorweave.kernels.weights import FP8

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # per element; bfloat16 has 8 bits
EPSILON = 1e-6


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("N", "K", "H", "P"), [(4, 2, 64, 16), (9, 3, 64, 32), (32, 8, 128, 32)], ids=str)
def test_equals_the_reference(
    N: int, K: int, H: int, P: int, normed: bool, dtype: torch.dtype, device: torch.device, pdl: bool
) -> None:
    T, blocks, positions_end = 7, 5, 50
    heads = torch.randn(T, N + 2 * K + 1, H, device=device).to(dtype)[:, : N + 2 * K]  # rows with a stride
    cache = torch.full((blocks, 2 * K, P, H), float("nan"), device=device, dtype=dtype)
    slots = torch.randperm(blocks * P, device=device)[:T]
    slots[3] = -1
    positions = torch.randint(0, positions_end, (T,), device=device)
    angles = torch.rand(positions_end, H // 2, device=device) * 6
    gains = [torch.rand(H, device=device).add(0.5).to(dtype) if normed else None for _ in range(2)]

    wide = heads.double()
    if gains[0] is not None and gains[1] is not None:
        gain = torch.cat([gains[0].expand(N, H), gains[1].expand(K, H)]).double()
        wide[:, : N + K] *= gain / (wide[:, : N + K].square().mean(-1, keepdim=True) + EPSILON).sqrt()
    left, right = wide[:, : N + K].chunk(2, -1)
    cos, sin = angles[positions, None].double().cos(), angles[positions, None].double().sin()
    wide[:, : N + K] = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    expected = cache.double()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // P, :, slot % P] = wide[token, N:]

    table = torch.cat([angles.cos(), angles.sin()], -1)
    rope_store(
        heads, cache, slots, positions, table, query_norm_H=gains[0], key_norm_H=gains[1], epsilon=EPSILON, pdl=pdl
    )
    torch.testing.assert_close(heads.double(), wide, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(cache.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


def test_an_8_bit_cache(device: torch.device, pdl: bool, gpu_only: None) -> None:
    heads, cache = torch.randn(3, 4, 64, device=device).bfloat16(), torch.zeros(2, 2, 16, 64, device=device).to(FP8)
    heads[1, 3, 5], heads[2, 3, 6] = 1000.0, -1e30
    before, slots = heads.clone(), torch.tensor([3, 17, -1], device=device)
    table = torch.cat([torch.ones(8, 32, device=device), torch.zeros(8, 32, device=device)], -1)  # no rotation
    rope_store(heads, cache, slots, torch.arange(3, device=device), table, pdl=pdl)
    assert torch.equal(heads, before)
    expected = torch.zeros(2, 2, 16, 64, device=device)
    expected[0, :, 3] = before[0, 2:].to(FP8).float()
    expected[1, :, 1] = before[1, 2:].clamp(-448, 448).to(FP8).float()  # what is beyond e4m3 becomes its largest number
    assert torch.equal(cache.float(), expected)
