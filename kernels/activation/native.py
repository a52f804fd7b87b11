"""The gated activations by the native kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorweave.kernels.native.library import NativeKernels

# T tokens, I intermediate width


@dataclass(frozen=True, slots=True)
class NativeSiluMul:
    native: NativeKernels

    def __call__(self, gate_up_T2I: Tensor) -> Tensor:
        return _activated(self.native.silu_mul, gate_up_T2I)


@dataclass(frozen=True, slots=True)
class NativeGeluMul:
    native: NativeKernels

    def __call__(self, gate_up_T2I: Tensor) -> Tensor:
        return _activated(self.native.gelu_mul, gate_up_T2I)


def _activated(kernel: Any, gate_up_T2I: Tensor) -> Tensor:
    assert gate_up_T2I.is_contiguous()
    T, width = gate_up_T2I.shape
    out_TI = torch.empty(T, width // 2, dtype=gate_up_T2I.dtype)
    kernel(gate_up_T2I.data_ptr(), out_TI.data_ptr(), T, width // 2)
    return out_TI
