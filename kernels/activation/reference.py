"""The gated activations of MLPs, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# T tokens, I intermediate width


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """[T, 2 I] with the gate in the first half: silu(gate) * up, [T, I] (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


def gelu_mul(gate_up_T2I: Tensor) -> Tensor:
    """The same with gelu(gate), in its approximation by tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return F.gelu(gate_TI, approximate="tanh").mul_(up_TI)
