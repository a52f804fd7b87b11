"""Matrix products with the weights of a layer, made once at load by `make_linear`.

On a CPU with native kernels the weights are packed for them; elsewhere they stay as they are, for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.weights import PackedWeight, pack_weight

# M rows, N outputs, K inputs


class Linear(Protocol):
    """x[M, K] to x weightᵀ + bias, [M, N]. `to_float32` gives it in float32 whatever the type, unrounded if it can."""

    def __call__(self, x_MK: Tensor) -> Tensor: ...

    def to_float32(self, x_MK: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TorchLinear:
    weight_NK: Tensor
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return F.linear(x_MK, self.weight_NK, self.bias_N)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        return self(x_MK).to(torch.float32)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The native product. A row's result does not depend on the other rows: the same bits in any batch.

    2,048 rows by SmolLM2's weights (EPYC of the fifth generation, 1 thread, 2026-11): float32 250 to 259 GFLOP/s, where
    registers alone reach 281; bfloat16 506 to 533.
    """

    multiply: Any
    packed: Tensor
    bias_N: Tensor | None
    num_outputs: int
    num_inputs: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        out_MN = torch.empty(len(x_MK), self.num_outputs, dtype=x_MK.dtype)
        self._multiply(x_MK, out_MN.data_ptr(), None)
        return out_MN

    def to_float32(self, x_MK: Tensor) -> Tensor:
        wide_MN = torch.empty(len(x_MK), self.num_outputs, dtype=torch.float32)
        self._multiply(x_MK, None, wide_MN.data_ptr())
        return wide_MN

    def _multiply(self, x_MK: Tensor, out: int | None, wide: int | None) -> None:
        M, K = x_MK.shape
        scratch = torch.empty(M, K, dtype=x_MK.dtype)
        bias = None if self.bias_N is None else self.bias_N.data_ptr()
        weights = self.packed.data_ptr()
        self.multiply(
            x_MK.data_ptr(), x_MK.stride(0), weights, bias, out, wide, scratch.data_ptr(), M, self.num_outputs, K
        )


def make_linear(weight_NK: Tensor | PackedWeight, bias_N: Tensor | None = None) -> Linear:
    """The fastest form for this device, type and shape. A weight that comes packed must suit this machine."""
    weight = weight_NK if isinstance(weight_NK, PackedWeight) else pack_weight(weight_NK)
    if weight is None:
        assert isinstance(weight_NK, Tensor)
        return TorchLinear(weight_NK, bias_N)
    native = load_native(weight.dtype)
    assert native is not None
    multiply = native.linear if weight.values.dtype == weight.dtype else native.linear_by_bf16
    assert multiply is not None
    return PackedLinear(multiply, weight.values, bias_N, weight.num_outputs, weight.num_inputs)
