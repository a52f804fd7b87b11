"""`add_rms_norm`, and norms of rows that are split over ranks, by the native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.native.library import NativeKernels

# T tokens, D width


@dataclass(frozen=True, slots=True)
class NativeAddRmsNorm:
    native: NativeKernels

    def __call__(
        self, x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, epsilon: float, offset: float = 0.0
    ) -> Tensor:
        assert x_TD.is_contiguous()
        assert update_TD is None or update_TD.is_contiguous()
        out_TD = torch.empty_like(x_TD)
        update, weight = None if update_TD is None else update_TD.data_ptr(), weight_D.data_ptr()
        self.native.add_rms_norm(x_TD.data_ptr(), update, weight, out_TD.data_ptr(), *x_TD.shape, epsilon, offset)
        return out_TD


@dataclass(frozen=True, slots=True)
class NativeSplitNorm:
    native: NativeKernels

    def squares(self, x_TD: Tensor) -> Tensor:
        assert x_TD.stride(1) == 1
        out_T = torch.empty(len(x_TD), dtype=torch.float32)
        self.native.square_sums(x_TD.data_ptr(), x_TD.stride(0), out_T.data_ptr(), *x_TD.shape)
        return out_T

    def scale(self, x_TD: Tensor, squares_T: Tensor, weight_D: Tensor, width: int, epsilon: float) -> None:
        assert x_TD.stride(1) == 1
        assert squares_T.is_contiguous()
        self.native.scale_by_rms(
            x_TD.data_ptr(),
            x_TD.stride(0),
            squares_T.data_ptr(),
            weight_D.data_ptr(),
            *x_TD.shape,
            width,
            epsilon,
        )
