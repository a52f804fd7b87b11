"""Prompt chunks over a paged cache with poisoned slots, and what float64 makes of them: for every kernel of prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Relative error of the whole result in the Frobenius norm."""

CHUNKS = [(0, 1), (0, 130), (63, 2), (64, 65), (200, 129)]
"""(position, length), one sequence each."""

LARGE_CHUNKS = [(0, 2048), (0, 1000), (1500, 777), (2048, 2048)]

Attend = Callable[[Tensor, Tensor, Tensor, list[tuple[int, int, int]], Tensor, float, int | None], None]
"""(queries, cache, table, chunks of (first row, position, length), out, scale, window)."""


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
    attend: Attend, lengths: list[tuple[int, int]], N: int, K: int, H: int, P: int, dtype: torch.dtype,
    window: int | None, device: torch.device, repeats: int = 0, kv_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Chunks of (position, length), one sequence each, and equal bits in `repeats` more runs. `kv_dtype`: keys and
    values are numbers of that type."""
    W = -(-max(sum(each) for each in lengths) // P) + 1
    cache = torch.randn(len(lengths) * W, 2 * K, P, H, device=device).to(kv_dtype or dtype).to(dtype)
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
    out = torch.full((T, N, H), float("nan"), device=device, dtype=dtype)
    attend(heads[:, :N], cache, table, chunks, out, H**-0.5, window)
    for sequence, (first, position, length) in enumerate(chunks):
        expected = reference(heads[first : first + length, :N], cache, table[sequence], position, window)
        ours = out[first : first + length].double()
        assert ((ours - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]
    for _ in range(repeats):
        again = torch.full_like(out, float("nan"))
        attend(heads[:, :N], cache, table, chunks, again, H**-0.5, window)
        assert torch.equal(again, out)
