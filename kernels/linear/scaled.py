"""Native products with 8-bit floats. e4m3 is a part of bfloat16: the values multiply as packed bfloat16 weights, in
twice their memory, and scales apply to the sums.

2,048 x 2,048, one row, per output / in groups of 128: 0.35 / 0.64 ms, the reference 47 / 35 ms (float32, EPYC of the
fifth generation, busy, 2026-11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.weights import FP8, GroupedFloatWeight, QuantizedWeight, Weight, quantize_rows

# M rows, N outputs, K inputs, G groups of inputs

_LEAST_GROUP: Final = 64
"""Below it a product for each group of inputs takes longer than the reference."""

MakeLinear = Callable[[Weight, Tensor | None], Linear]


@dataclass(frozen=True, slots=True)
class ScaledLinear:
    """The arithmetic of `reference.QuantizedLinear`: rows are quantized on the way."""

    values: Linear
    scales_N: Tensor
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.to_float32(x_MK).to(x_MK.dtype)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        rows_MK, scales_M = quantize_rows(x_MK)
        out_MN = self.values.to_float32(rows_MK.to(x_MK.dtype))
        out_MN *= scales_M.unsqueeze(1) * self.scales_N
        return out_MN if self.bias_N is None else out_MN + self.bias_N


@dataclass(frozen=True, slots=True)
class GroupSumLinear:
    """One product for each group of inputs, whose sums are scaled and added in the order of the groups. Rows stay as
    they are."""

    groups: Sequence[tuple[slice, Linear]]
    scales_GN: Tensor
    bias_N: Tensor | None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.to_float32(x_MK).to(x_MK.dtype)

    def to_float32(self, x_MK: Tensor) -> Tensor:
        out_MN = torch.zeros(len(x_MK), self.scales_GN.shape[1])
        for (inputs, values), scales_N in zip(self.groups, self.scales_GN, strict=True):
            out_MN.addcmul_(values.to_float32(x_MK[:, inputs]), scales_N)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)


def make_scaled(
    weight: QuantizedWeight | GroupedFloatWeight, bias_N: Tensor | None, make_values: MakeLinear
) -> ScaledLinear | GroupSumLinear | None:
    """`make_values` makes the products of values without their scales. None where groups are small."""
    if isinstance(weight, QuantizedWeight):
        return ScaledLinear(make_values(weight.values_NK.to(weight.dtype), None), weight.scales_N, bias_N)
    if weight.group_size < _LEAST_GROUP:
        return None
    values_NK, K, size = weight.codes.view(FP8), weight.num_inputs, weight.group_size
    inputs = [slice(first, min(first + size, K)) for first in range(0, K, size)]
    groups = [(each, make_values(values_NK[:, each].to(weight.dtype), None)) for each in inputs]
    return GroupSumLinear(groups, weight.scales_NG.T.contiguous(), bias_N)
