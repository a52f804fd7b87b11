"""Attention of prompt chunks by the kernel for Hopper against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.attention.cuda_prefill import prefill_attention
from tensorweave.kernels.attention.tiles import tile_queries
from tests.kernels.attention.prefill_cases import CHUNKS, LARGE_CHUNKS, check

pytestmark = pytest.mark.gpu


def attend(
    q_TNH: Tensor, cache: Tensor, table: Tensor, chunks: list[tuple[int, int, int]], out: Tensor, scale: float,
    window: int | None,
) -> None:  # fmt: skip
    tiles = tile_queries(chunks, num_tiles=len(tile_queries(chunks)) + 3)
    among_others = torch.zeros(1 + tiles.numel(), dtype=torch.int32, device=q_TNH.device)  # at 4 bytes, not 16
    among_others[1:] = tiles.flatten()
    prefill_attention(q_TNH, cache, table, among_others[1:].view(-1, 4), out, scale=scale, window=window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize(
    ("N", "K", "H", "P"), [(2, 1, 128, 32), (3, 3, 64, 16), (4, 2, 64, 128), (8, 2, 128, 256), (9, 3, 64, 8)], ids=str
)
def test_equals_the_reference(
    N: int, K: int, H: int, P: int, window: int | None, dtype: torch.dtype, hopper: torch.device
) -> None:
    check(attend, [*CHUNKS, (0, 700), (300, 384)], N, K, H, P, dtype, window, hopper)


@pytest.mark.parametrize("N", [32, 8])
def test_full_grid_repeats_its_bits(N: int, hopper: torch.device) -> None:
    """Products with a left operand in registers, in flight while others are computed: large grids, many runs."""
    check(attend, LARGE_CHUNKS, N, 8, 128, 32, torch.bfloat16, None, hopper, repeats=100)
