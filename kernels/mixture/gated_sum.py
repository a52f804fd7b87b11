"""What a shared expert adds: its output times a sigmoid of each row's own, in torch and by the native kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.native.library import NativeKernels

# T tokens, D hidden size


def add_gated(out_TD: Tensor, gate_T1: Tensor, x_TD: Tensor) -> None:
    """out += sigmoid(gate) * x, in place; computed in float32 and rounded once."""
    out_TD.copy_(out_TD.float() + torch.sigmoid(gate_T1.float()) * x_TD.float())


@dataclass(frozen=True, slots=True)
class NativeAddGated:
    """A row's result does not depend on the other rows, as it does with torch's sigmoid of a vector."""

    native: NativeKernels

    def __call__(self, out_TD: Tensor, gate_T1: Tensor, x_TD: Tensor) -> None:
        T, D = out_TD.shape
        assert out_TD.is_contiguous()
        assert x_TD.is_contiguous()
        assert gate_T1.numel() == T
        self.native.add_gated(out_TD.data_ptr(), gate_T1.data_ptr(), x_TD.data_ptr(), T, D)
