"""Attention of prompt chunks against float64: prefixes, windows, padded tiles; equal bits at full size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.attention.triton_prefill import prefill_attention, tile_queries

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # relative error of the whole result in the Frobenius norm


def reference(q_LNH: Tensor, cache: Tensor, blocks: Tensor, position: int, window: int | None) -> Tensor:
    L, N, H = q_LNH.shape
    C = cache.shape[1]
    kept = (
        cache[blocks.long()].transpose(0, 1).reshape(C, -1, H)[:, : position + L].double().nan_to_num()
    )  # poisoned before the window
    q = q_LNH.double().view(L, C // 2, -1, H)
    scores = torch.einsum("qkgh,klh->kgql", q, kept[: C // 2]) * H**-0.5
    distance = position + torch.arange(L, device=q.device)[:, None] - torch.arange(position + L, device=q.device)
    is_hidden = (distance < 0) | (distance >= (window or 1 << 30))
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(-1)
    return torch.einsum("kgql,klh->qkgh", weights, kept[C // 2 :]).reshape(L, N, H)


def check(
    lengths: list[tuple[int, int]], N: int, K: int, H: int, P: int, dtype: torch.dtype, window: int | None,
    device: torch.device, repeats: int = 0,
) -> None:  # fmt: skip
    """Chunks of (position, length), one sequence each."""
    W = -(-max(sum(each) for each in lengths) // P) + 1
    cache = torch.randn(len(lengths) * W, 2 * K, P, H, device=device).to(dtype)
    table = torch.randperm(len(lengths) * W, device=device).view(len(lengths), W).int()
    T = sum(length for _, length in lengths)
    heads = torch.randn(T, N + 2 * K, H, device=device).to(dtype)
    chunks, row = [], 0
    for sequence, (position, length) in enumerate(lengths):
        chunks.append((row, position, length))
        row += length
        for at in range(position + length, W * P):  # past the end
            cache[table[sequence, at // P].long(), :, at % P] = float("nan")
        if window is not None:
            for at in range((position - window + 1) // P):  # blocks that no query sees
                cache[table[sequence, at].long()] = float("nan")
    tiles = tile_queries(chunks, num_tiles=len(tile_queries(chunks)) + 3).to(device)
    out = torch.full((T, N, H), float("nan"), device=device, dtype=dtype)
    prefill_attention(heads[:, :N], cache, table, tiles, out, scale=H**-0.5, window=window)
    for sequence, (first, position, length) in enumerate(chunks):
        expected = reference(heads[first : first + length, :N], cache, table[sequence], position, window)
        ours = out[first : first + length].double()
        assert ((ours - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]
    for _ in range(repeats):
        again = torch.full_like(out, float("nan"))
        prefill_attention(heads[:, :N], cache, table, tiles, again, scale=H**-0.5, window=window)
        assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("N", "K", "H", "P"), [(2, 1, 128, 32), (3, 3, 64, 16), (4, 2, 64, 128)], ids=str)
def test_equals_the_reference(
    N: int, K: int, H: int, P: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    check([(0, 1), (0, 130), (63, 2), (64, 65), (200, 129)], N, K, H, P, dtype, window, device)


def test_full_grid_repeats_its_bits(device: torch.device, gpu_only: None) -> None:
    """The product with a left operand in registers is what Triton 3.6 may get wrong: large grids, many runs."""
    check([(0, 2048), (0, 1000), (1500, 777), (2048, 2048)], 32, 8, 128, 32, torch.bfloat16, None, device, repeats=100)


def test_too_many_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        tile_queries([(0, 0, 300)], num_tiles=2)
