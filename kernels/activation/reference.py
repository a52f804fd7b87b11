"""The gated activation of the MLP: silu(gate) * up, from one fused matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.native.library import native_for

# T tokens, I intermediate width


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """[T, 2 I] with the gate in the first half: silu(gate) * up, [T, I] (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""
    native = native_for(gate_up_T2I)
    if native is None:
        gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
        return F.silu(gate_TI).mul_(up_TI)
    assert gate_up_T2I.is_contiguous()
    T, width = gate_up_T2I.shape
    out_TI = torch.empty(T, width // 2, dtype=gate_up_T2I.dtype)
    native.silu_mul(gate_up_T2I.data_ptr(), out_TI.data_ptr(), T, width // 2)
    return out_TI
