"""Paged attention query by query in float32: the oracle of the tests. Too slow to serve with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import Span

# T tokens of the batch, N query heads, K KV heads, H head dim, L keys
# B blocks, P tokens per block, C = 2 K planes of a block: its K key heads, then its K value heads


def paged_attention_reference(
    q_TNH: Tensor,
    cache_BCPH: Tensor,
    spans: Sequence[Span],
    kv_of_query: Sequence[int],
    window: int | None,
    scale: float,
    *,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """`kv_of_query` has the KV head of each query head."""
    K, P = cache_BCPH.shape[1] // 2, cache_BCPH.shape[2]
    heads_N = torch.tensor(kv_of_query)
    out_TNH = torch.empty_like(q_TNH)
    for span in spans:
        positions_L = torch.arange(span.stop)
        blocks_L = torch.tensor(span.blocks)[positions_L // P]
        kv_LCH = cache_BCPH[blocks_L, :, positions_L % P].float()
        k_LNH, v_LNH = kv_LCH[:, heads_N], kv_LCH[:, K + heads_N]
        for row in range(span.first_row, span.first_row + span.length):
            last = span.start + row - span.first_row
            seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
            scores_NL = torch.einsum("nh,lnh->nl", q_TNH[row].float(), k_LNH[seen]) * scale
            if soft_cap is not None:
                scores_NL = soft_cap * torch.tanh(scores_NL / soft_cap)
            if sinks_N is not None:
                scores_NL = torch.cat([scores_NL, sinks_N.unsqueeze(1)], dim=1)
            weights_NL = torch.softmax(scores_NL, dim=-1)[:, : last + 1 - seen.start]
            out_TNH[row] = torch.einsum("nl,lnh->nh", weights_NL, v_LNH[seen]).to(out_TNH.dtype)
    return out_TNH
