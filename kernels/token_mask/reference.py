"""Rows of logits that keep the tokens of a mask alone, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

# R rows of logits, N of them masked, V vocabulary, W = ⌈V / 32⌉ words of bits


def mask_tokens(logits_RV: Tensor, masks_NW: Tensor, rows_N: Tensor) -> None:
    """Set the logits of tokens whose bit is not set to minus infinity, in place.

    Args:
        masks_NW: int32; bit t % 32 of word t / 32 is token t's.
        rows_N: int32; the rows of logits that the masks are for.
    """
    V = logits_RV.shape[1]
    bits_NV = (masks_NW.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=masks_NW.device)) & 1
    is_banned_NV = bits_NV.view(len(masks_NW), -1)[:, :V] == 0
    rows_N = rows_N.long()
    logits_RV[rows_N] = logits_RV[rows_N].masked_fill_(is_banned_NV, -torch.inf)
