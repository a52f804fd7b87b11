"""The largest of each row of logits, if it has one. Called once a step, for the rows that are decoded greedily."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.native import native_for

# R rows, V vocabulary


NO_PLACE: Final = -1


def argmax(x_RV: Tensor) -> Tensor:
    """[R] int64: the first place of the largest number of each row; NO_PLACE where the row holds NaN, or its largest
    number is infinite: plus infinity, or minus infinity in every place.

    16 rows of 49,152 in float32 on one thread: 0.45 ms in torch.
    """
    native = native_for(x_RV)
    if native is None or native.argmax is None or not x_RV.is_contiguous():
        best_R = x_RV.argmax(dim=-1)  # of NaN, if there is one
        largest_R = x_RV.gather(1, best_R.unsqueeze(1)).squeeze(1)
        return torch.where(largest_R.isfinite(), best_R, NO_PLACE)
    out_R = torch.empty(len(x_RV), dtype=torch.int64)
    native.argmax(x_RV.data_ptr(), out_R.data_ptr(), *x_RV.shape)
    return out_R
