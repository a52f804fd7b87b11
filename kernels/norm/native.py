"""`add_rms_norm` by the native kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.native.library import NativeKernels

# T tokens, D width


@dataclass(frozen=True, slots=True)
class NativeAddRmsNorm:
    native: NativeKernels

    def __call__(self, x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, epsilon: float) -> Tensor:
        assert x_TD.is_contiguous()
        assert update_TD is None or update_TD.is_contiguous()
        out_TD = torch.empty_like(x_TD)
        update = None if update_TD is None else update_TD.data_ptr()
        self.native.add_rms_norm(x_TD.data_ptr(), update, weight_D.data_ptr(), out_TD.data_ptr(), *x_TD.shape, epsilon)
        return out_TD
