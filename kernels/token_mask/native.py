"""`mask_tokens` of `kernels.token_mask.reference` by the native kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# R rows of logits, N of them masked, V vocabulary, W = ⌈V / 32⌉ words of bits


@dataclass(frozen=True, slots=True)
class NativeMaskTokens:
    kernel: Any

    def __call__(self, logits_RV: Tensor, masks_NW: Tensor, rows_N: Tensor) -> None:
        assert logits_RV.dtype == torch.float32
        assert masks_NW.dtype == rows_N.dtype == torch.int32
        assert logits_RV.is_contiguous()
        assert masks_NW.is_contiguous()
        N, V = len(rows_N), logits_RV.shape[1]
        assert masks_NW.shape == (N, (V + 31) // 32)
        self.kernel(logits_RV.data_ptr(), masks_NW.data_ptr(), rows_N.data_ptr(), N, V)
