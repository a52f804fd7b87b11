"""The largest of each row of logits. Called once a step, for the rows that are decoded greedily."""

from __future__ import annotations

import torch
from torch import Tensor

from tensorweave.kernels.native import native_for

# R rows, V vocabulary


def argmax(x_RV: Tensor) -> Tensor:
    """[R] int64: the first place of the largest number of each row. Where a row holds NaN, any place.

    16 rows of 49,152 in float32: 0.5 ms in torch, on one thread.
    """
    native = native_for(x_RV)
    if native is None or native.argmax is None or not x_RV.is_contiguous():
        return x_RV.argmax(dim=-1)
    out_R = torch.empty(len(x_RV), dtype=torch.int64)
    native.argmax(x_RV.data_ptr(), out_R.data_ptr(), *x_RV.shape)
    return out_R
