"""Rotary position embedding of query and key heads, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

# T tokens, N heads, H head dim


def rope(x_TNH: Tensor, table_TH: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) of each head by its token's angles (Su et al. 2021, arXiv 2104.09864).

    Args:
        x_TNH: heads, float of any width.
        table_TH: float32; cosines of the H/2 angles of each token, then their sines.

    Returns:
        A new contiguous [T, N, H] in x's dtype; computed in float32.
    """
    cos, sin = table_TH.unsqueeze(1).chunk(2, dim=-1)
    left, right = x_TNH.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x_TNH.dtype)
