"""Integers of 2, 4 or 8 bits that checkpoints pack into 32-bit words, the first in the lowest bits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# R rows, W words of a row, C codes of a row

WORD_BITS: Final = 32


def codes_of_words(words_RW: Tensor, bits: int) -> Tensor:
    """uint8 [R, W * 32 / bits], one code a byte."""
    octets = words_RW.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((octets.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)
