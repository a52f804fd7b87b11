"""Matrix products with weights packed for the native kernels. What has no native product goes to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorweave.kernels.linear import reference
from tensorweave.kernels.linear.grouped import PackedGroupedLinear
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.linear.scaled import make_scaled
from tensorweave.kernels.native.library import NativeKernels
from tensorweave.kernels.native.structures import Matrix, MatrixForm
from tensorweave.kernels.weights import (
    GroupedFloatWeight,
    GroupedWeight,
    PackedWeight,
    QuantizedWeight,
    ReorderedWeight,
    StackedWeight,
    Weight,
    pack_weight,
)

# M rows, N outputs, K inputs


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A row's result does not depend on the other rows: it has the same bits in any batch.

    2,048 rows by SmolLM2's weights (EPYC of the fifth generation, 1 thread, 2026-11): float32 250 to 259 GFLOP/s, where
    registers alone reach 281; bfloat16 506 to 533.
    """

    multiply: Any
    weight: PackedWeight
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        out_MN = torch.empty(len(x_MK), self.weight.num_outputs, dtype=x_MK.dtype)
        self._multiply(x_MK, out_MN.data_ptr(), None)
        return out_MN

    def to_float32(self, x_MK: Tensor) -> Tensor:
        wide_MN = torch.empty(len(x_MK), self.weight.num_outputs, dtype=torch.float32)
        self._multiply(x_MK, None, wide_MN.data_ptr())
        return wide_MN

    @property
    def matrix(self) -> Matrix:
        """For kernels that multiply by it among other things. It must not outlive this object."""
        weight = self.weight
        return Matrix(
            packed=weight.values.data_ptr(),
            bias=None if self.bias_N is None else self.bias_N.data_ptr(),
            num_outputs=weight.num_outputs,
            num_inputs=weight.num_inputs,
            form=MatrixForm.PACKED if weight.values.dtype == weight.dtype else MatrixForm.NARROW,
        )

    def _multiply(self, x_MK: Tensor, out: int | None, wide: int | None) -> None:
        M, K = x_MK.shape
        scratch = torch.empty(M, K, dtype=x_MK.dtype)
        bias = None if self.bias_N is None else self.bias_N.data_ptr()
        values, N = self.weight.values.data_ptr(), self.weight.num_outputs
        self.multiply(x_MK.data_ptr(), x_MK.stride(0), values, bias, out, wide, scratch.data_ptr(), M, N, K)


@dataclass(frozen=True, slots=True)
class MakeNativeLinear:
    native: NativeKernels

    def __call__(self, weight: Weight, bias_N: Tensor | None = None) -> Linear:
        """A weight that comes packed must suit this machine."""
        if isinstance(weight, StackedWeight | ReorderedWeight):
            return reference.make_composite(weight, bias_N, self)
        if isinstance(weight, GroupedFloatWeight) and weight.kind == "e2m1":
            weight = weight.in_integers()
        if isinstance(weight, QuantizedWeight | GroupedFloatWeight):
            return make_scaled(weight, bias_N, self) or reference.make_linear(weight, bias_N)
        if isinstance(weight, GroupedWeight):
            grouped = PackedGroupedLinear.of(self.native, weight, bias_N)
            return reference.make_linear(weight, bias_N) if grouped is None else grouped
        packed = weight if isinstance(weight, PackedWeight) else pack_weight(weight)
        if packed is None:
            return reference.make_linear(weight, bias_N)
        multiply = self.native.linear if packed.values.dtype == packed.dtype else self.native.linear_by_bf16
        assert multiply is not None
        return PackedLinear(multiply, packed, bias_N)
