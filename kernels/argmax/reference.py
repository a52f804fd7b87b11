"""The largest number of each row of logits, in torch. Called once per step, for the rows that are decoded greedily."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# R rows, V vocabulary

NO_PLACE: Final = -1
"""The answer for a row that holds NaN, or whose largest number is plus infinity."""
NOTHING_LEFT: Final = -2
"""The answer for a row that holds minus infinity in every place."""


def argmax(x_RV: Tensor) -> Tensor:
    """[R] int64: the first place of the largest number of each row, or NO_PLACE or NOTHING_LEFT.

    On an H100, with the copy to the host, 0.07 ms for 16 rows of 49,152, 0.03 ms more than torch's argmax (2026-11-26).
    """
    largest_R, best_R = x_RV.max(dim=-1)  # NaN, if there is one
    return best_R.masked_fill_(largest_R * 0 != 0, NO_PLACE).masked_fill_(largest_R == -torch.inf, NOTHING_LEFT)
