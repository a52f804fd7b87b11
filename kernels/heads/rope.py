"""Rotary position embedding of query and key heads, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

# T tokens, N heads, H head dim, W elements of a head that are rotated


def rope(x_TNH: Tensor, table_TW: Tensor, *, has_neighbours: bool = False) -> Tensor:
    """Rotate pairs of each head's first W elements by its token's angles (Su et al. 2021, arXiv 2104.09864).

    Args:
        x_TNH: heads, float of any width.
        table_TW: float32; cosines of the W/2 angles of each token, then their sines.
        has_neighbours: pairs are (2i, 2i + 1) instead of (i, i + W/2).

    Returns:
        A new contiguous [T, N, H] in x's dtype; computed in float32.
    """
    cos, sin = table_TW.unsqueeze(1).chunk(2, dim=-1)
    W = table_TW.shape[-1]
    turned, kept = x_TNH[..., :W], x_TNH[..., W:]
    left, right = (turned[..., 0::2], turned[..., 1::2]) if has_neighbours else turned.chunk(2, dim=-1)
    pair = left * cos - right * sin, right * cos + left * sin
    rotated = torch.stack(pair, dim=-1).flatten(-2) if has_neighbours else torch.cat(pair, dim=-1)
    return torch.cat([rotated.to(x_TNH.dtype), kept], dim=-1)
