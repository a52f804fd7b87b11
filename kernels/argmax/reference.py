"""The largest of each row of logits, if it has one. Called once a step, for the rows that are decoded greedily."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.native.library import native_for

# R rows, V vocabulary


NO_PLACE: Final = -1


def argmax(x_RV: Tensor) -> Tensor:
    """[R] int64: the first place of the largest number of each row; NO_PLACE where the row holds NaN, or its largest
    number is infinite: plus infinity, or minus infinity in every place.

    16 rows of 49,152 in float32: 0.065 ms natively on one thread (EPYC; torch's argmax takes 0.44 ms); on an H100, with
    the copy to the host, 0.07 ms, 0.03 ms more than torch's argmax (2026-11-26).
    """
    native = native_for(x_RV)
    if native is None or native.argmax is None or not x_RV.is_contiguous():
        largest_R, best_R = x_RV.max(dim=-1)  # NaN, if there is one
        return best_R.masked_fill_(largest_R * 0 != 0, NO_PLACE)
    out_R = torch.empty(len(x_RV), dtype=torch.int64)
    native.argmax(x_RV.data_ptr(), out_R.data_ptr(), *x_RV.shape)
    return out_R
