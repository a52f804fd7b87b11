"""`silu_mul` by the native kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.native.library import NativeKernels

# T tokens, I intermediate width


@dataclass(frozen=True, slots=True)
class NativeSiluMul:
    native: NativeKernels

    def __call__(self, gate_up_T2I: Tensor) -> Tensor:
        assert gate_up_T2I.is_contiguous()
        T, width = gate_up_T2I.shape
        out_TI = torch.empty(T, width // 2, dtype=gate_up_T2I.dtype)
        self.native.silu_mul(gate_up_T2I.data_ptr(), out_TI.data_ptr(), T, width // 2)
        return out_TI
