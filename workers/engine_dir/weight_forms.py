"""Weights of every quantized form as named tensors of an engine directory, and back.

Beside the codes, which have the matrix's own name, lie scales, minimums and what else a form has, under that name with
an ending. A stack's parts have numbers, and `.parts` their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.grouped_float_weight import FloatKind
from tensorweave.kernels.weights import (
    GroupedFloatWeight,
    GroupedWeight,
    QuantizedWeight,
    ReorderedWeight,
    StackedWeight,
    Weight,
    num_outputs,
)

_SCALES: Final = ".scales"
_MINIMUMS: Final = ".minimums"
_FORM: Final = ".form"  # of integers: inputs, group size, bits, zero, bits of rows; of floats: inputs, group size, bits
_ORDER: Final = ".order"
_PARTS: Final = ".parts"
_NUM_OF_FLOATS: Final = 3

QuantizedForm = QuantizedWeight | GroupedWeight | GroupedFloatWeight | ReorderedWeight | StackedWeight


def tensors_of(name: str, weight: QuantizedForm | Tensor) -> Iterator[tuple[str, Tensor]]:
    match weight:
        case Tensor():
            yield name, weight
        case QuantizedWeight():
            yield from ((name, weight.values_NK), (name + _SCALES, weight.scales_N))
        case GroupedFloatWeight():
            form = (weight.num_inputs, weight.group_size, weight.bits)
            yield from ((name, weight.codes), (name + _SCALES, weight.scales_NG), (name + _FORM, torch.tensor(form)))
        case GroupedWeight():
            grouped = (weight.num_inputs, weight.group_size, weight.bits, weight.zero, weight.row_bits)
            yield from ((name, weight.codes), (name + _SCALES, weight.scales_NG), (name + _FORM, torch.tensor(grouped)))
            if weight.minimums_NG is not None:
                yield name + _MINIMUMS, weight.minimums_NG
        case ReorderedWeight():
            yield from tensors_of(name, weight.weight)
            yield name + _ORDER, torch.cat([weight.order_P, torch.tensor([weight.num_inputs])])
        case StackedWeight():
            yield name + _PARTS, torch.tensor([num_outputs(part) for part in weight.parts])
            for number, part in enumerate(weight.parts):
                assert isinstance(part, QuantizedForm | Tensor), "parts of a checkpoint are not packed"
                yield from tensors_of(f"{name}.{number}", part)


@dataclass(frozen=True, slots=True)
class FormReader:
    """`has` reports whether there is a tensor of that name, `read` returns it."""

    has: Callable[[str], bool]
    read: Callable[[str], Tensor]
    dtype: torch.dtype

    def is_form(self, name: str) -> bool:
        """Whether there is a matrix in integers or floats in groups, or made of other forms, under that name."""
        return self.has(name + _FORM) or self.has(name + _PARTS)

    def form(self, name: str) -> GroupedWeight | GroupedFloatWeight | ReorderedWeight | StackedWeight:
        if self.has(name + _PARTS):
            count = len(self.read(name + _PARTS))
            return StackedWeight(tuple(self._part(f"{name}.{number}") for number in range(count)))
        weight = self._grouped(name)
        if not self.has(name + _ORDER):
            return weight
        assert isinstance(weight, GroupedWeight), "floats are not reordered"
        order = self.read(name + _ORDER)
        return ReorderedWeight(weight, order[:-1], int(order[-1]))

    def scaled(self, name: str) -> QuantizedWeight:
        return QuantizedWeight(self.read(name), self.read(name + _SCALES), self.dtype)

    def _part(self, name: str) -> Weight:
        if self.is_form(name):
            return self.form(name)
        return self.scaled(name) if self.has(name + _SCALES) else self.read(name).to(self.dtype)

    def _grouped(self, name: str) -> GroupedWeight | GroupedFloatWeight:
        form, codes, scales_NG = self.read(name + _FORM).tolist(), self.read(name), self.read(name + _SCALES)
        if len(form) == _NUM_OF_FLOATS:
            num_inputs, group_size, bits = form
            kind: FloatKind = "e4m3" if bits == 8 else "e2m1"
            return GroupedFloatWeight(codes, scales_NG, num_inputs, group_size, kind, self.dtype)
        num_inputs, group_size, bits, zero, row_bits = form
        minimums_NG = self.read(name + _MINIMUMS) if self.has(name + _MINIMUMS) else None
        return GroupedWeight(codes, scales_NG, minimums_NG, num_inputs, group_size, bits, zero, self.dtype, row_bits)
