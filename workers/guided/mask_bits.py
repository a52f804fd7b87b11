"""Single bits of a row of a mask."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor

# W = ⌈vocabulary / 32⌉ words


def clear_bits(mask_W: Tensor, tokens: Iterable[int]) -> None:
    bits = _bytes(mask_W)
    for token in tokens:
        bits[token >> 3] &= ~(1 << (token & 7)) & 0xFF


def set_bits(mask_W: Tensor, tokens: Iterable[int]) -> None:
    bits = _bytes(mask_W)
    for token in tokens:
        bits[token >> 3] |= 1 << (token & 7)


def allowed_tokens(mask_W: Tensor) -> npt.NDArray[np.int64]:
    """The tokens whose bits are set, in order."""
    return np.flatnonzero(np.unpackbits(_bytes(mask_W), bitorder="little"))


def _bytes(mask_W: Tensor) -> npt.NDArray[np.uint8]:
    return mask_W.numpy().view(np.uint8)
