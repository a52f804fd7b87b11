"""Matrix products with the weights of a layer, in torch, for every form of weight and every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.grouped_weight import round_rows, row_block
from tensorweave.kernels.weights import (
    GroupedFloatWeight,
    GroupedWeight,
    PackedCodes,
    PackedWeight,
    QuantizedWeight,
    ReorderedWeight,
    StackedWeight,
    Weight,
    num_outputs,
    quantize_rows,
)

# M rows, N outputs, K inputs, P places of inputs in another order


class Linear(Protocol):
    """x[M, K] weightᵀ + bias: [M, N]. Made once at load by `Operations.make_linear`.

    `to_float32` returns the product in float32 whatever the type of x, unrounded where the backend can.
    """

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
class QuantizedLinear:
    """The product of 8-bit rows and 8-bit weights: x is quantized row by row on the way, sums are in float32."""

    weight: QuantizedWeight
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.to_float32(x_MK).to(x_MK.dtype)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        rows_MK, scales_M = quantize_rows(x_MK)
        out_MN = rows_MK.float() @ self.weight.values_NK.float().T
        out_MN *= scales_M.unsqueeze(1) * self.weight.scales_N
        return out_MN if self.bias_N is None else out_MN + self.bias_N


@dataclass(frozen=True, slots=True)
class GroupedLinear:
    """The product of quantized rows and of weights that are dequantized in every call, in float32."""

    weight: GroupedWeight
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.to_float32(x_MK).to(x_MK.dtype)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        block = row_block(self.weight)
        rows_MK = x_MK.float() if block is None else round_rows(x_MK, self.weight.row_bits, block)
        out_MN = rows_MK @ self.weight.wide_rows().T
        return out_MN if self.bias_N is None else out_MN + self.bias_N


@dataclass(frozen=True, slots=True)
class DequantizedLinear:
    """The product of rows as they are and of weights that are dequantized in every call, in float32."""

    weight: GroupedFloatWeight | PackedCodes
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.to_float32(x_MK).to(x_MK.dtype)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        out_MN = x_MK.float() @ self.weight.wide_rows().T
        return out_MN if self.bias_N is None else out_MN + self.bias_N


@dataclass(frozen=True, slots=True)
class GroupedFloatLinear(DequantizedLinear):
    weight: GroupedFloatWeight


@dataclass(frozen=True, slots=True)
class StackedLinear:
    """One product for each part, its outputs beside those of the part before."""

    parts: tuple[Linear, ...]

    def __call__(self, x_MK: Tensor) -> Tensor:
        return torch.cat([part(x_MK) for part in self.parts], dim=1)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        return torch.cat([part.to_float32(x_MK) for part in self.parts], dim=1)


@dataclass(frozen=True, slots=True)
class ReorderedLinear:
    """`has_zeros`: `order_P` has places beyond the inputs, which are 0."""

    linear: Linear
    order_P: Tensor
    has_zeros: bool

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.linear(self._ordered(x_MK))

    def to_float32(self, x_MK: Tensor) -> Tensor:
        return self.linear.to_float32(self._ordered(x_MK))

    def _ordered(self, x_MK: Tensor) -> Tensor:
        return (F.pad(x_MK, (0, 1)) if self.has_zeros else x_MK).index_select(1, self.order_P)


def make_linear(weight: Weight, bias_N: Tensor | None = None) -> Linear:
    match weight:
        case QuantizedWeight():
            return QuantizedLinear(weight, bias_N)
        case GroupedWeight():
            return GroupedLinear(weight, bias_N)
        case GroupedFloatWeight():
            return GroupedFloatLinear(weight, bias_N)
        case PackedWeight():
            return TorchLinear(weight.rows().to(weight.dtype), bias_N)
        case StackedWeight() | ReorderedWeight():
            return make_composite(weight, bias_N, make_linear)
        case _:
            return TorchLinear(weight, bias_N)


def make_composite(
    weight: StackedWeight | ReorderedWeight, bias_N: Tensor | None, make: Callable[[Weight, Tensor | None], Linear]
) -> Linear:
    """A product with weights made of other forms, whose products `make` makes."""
    if isinstance(weight, ReorderedWeight):
        return ReorderedLinear(make(weight.weight, bias_N), weight.order_P, weight.has_zeros)
    linears, first = [], 0
    for part in weight.parts:
        last = first + num_outputs(part)
        linears.append(make(part, None if bias_N is None else bias_N[first:last]))
        first = last
    return StackedLinear(tuple(linears))
