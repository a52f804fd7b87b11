"""Attention of prompt chunks in Triton against float64: prefixes, windows, padded tiles; equal bits at full size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.attention.tiles import tile_queries
from tensorweave.kernels.attention.triton_prefill import prefill_attention
from tensorweave.kernels.weights import FP8
from tests.kernels.attention.prefill_cases import CHUNKS, LARGE_CHUNKS, check

pytestmark = pytest.mark.gpu


def attend(
    q_TNH: Tensor, cache: Tensor, table: Tensor, chunks: list[tuple[int, int, int]], out: Tensor, scale: float,
    window: int | None,
) -> None:  # fmt: skip
    tiles = tile_queries(chunks, num_tiles=len(tile_queries(chunks)) + 3).to(q_TNH.device)
    prefill_attention(q_TNH, cache, table, tiles, out, scale=scale, window=window)


def attend_8_bit(
    q_TNH: Tensor, cache: Tensor, table: Tensor, chunks: list[tuple[int, int, int]], out: Tensor, scale: float,
    window: int | None,
) -> None:  # fmt: skip
    attend(q_TNH, cache.to(FP8), table, chunks, out, scale, window)


@pytest.mark.parametrize("window", [None, 50])
def test_an_8_bit_cache(window: int | None, device: torch.device, gpu_only: None) -> None:
    check(attend_8_bit, CHUNKS, 8, 2, 128, 32, torch.bfloat16, window, device, repeats=20, kv_dtype=FP8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("N", "K", "H", "P"), [(2, 1, 128, 32), (3, 3, 64, 16), (4, 2, 64, 128)], ids=str)
def test_equals_the_reference(
    N: int, K: int, H: int, P: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    check(attend, CHUNKS, N, K, H, P, dtype, window, device)


def test_full_grid_repeats_its_bits(device: torch.device, gpu_only: None) -> None:
    """The product with a left operand in registers is what Triton 3.6 may get wrong: large grids, many runs."""
    check(attend, LARGE_CHUNKS, 32, 8, 128, 32, torch.bfloat16, None, device, repeats=100)


def test_too_many_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        tile_queries([(0, 0, 300)], num_tiles=2)
