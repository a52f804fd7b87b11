"""`Weight`: the forms in which a matrix of weights is kept. What multiplies by them is in `kernels.linear`.

A loader returns a `Weight`; `Operations.make_linear` takes it, in whichever form it comes.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import torch
from torch import Tensor

from tensorweave.kernels.grouped_float_weight import GroupedFloatWeight as GroupedFloatWeight
from tensorweave.kernels.grouped_float_weight import stack_grouped_floats
from tensorweave.kernels.grouped_weight import GroupedWeight as GroupedWeight
from tensorweave.kernels.grouped_weight import stack_grouped as stack_grouped
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.packed_codes import PackedCodes as PackedCodes
from tensorweave.kernels.reordered_weight import ReorderedWeight as ReorderedWeight

# N outputs, K inputs

FP8: Final = torch.float8_e4m3fn
_QUANTIZED_AT_ONCE: Final = 1 << 24  # elements


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix in the order in which the native product streams it: made at load, or read from an engine directory.

    A directory may come from a CPU whose kernels use another order: `suits` reports whether these kernels can read this
    one, and `rows` restores the matrix.

    `values` is [panels, K / step, outputs of a panel, step], one panel after the other; outputs past N are zeros.
    `dtype` is that of the rows it multiplies. Float32 weights that came from bfloat16 are kept so: the results have the
    same bits, from half the memory.
    """

    values: Tensor
    num_outputs: int
    dtype: torch.dtype

    @property
    def num_inputs(self) -> int:
        return self.values.shape[1] * self.values.shape[3]

    def suits(self) -> bool:
        """Whether this machine's kernels read exactly this order."""
        native = load_native(self.dtype)
        if native is None or native_layout(self.values.dtype) != (self.values.shape[2], self.values.shape[3]):
            return False
        return self.values.dtype == self.dtype or native.linear_by_bf16 is not None

    def rows(self) -> Tensor:
        """[N, K], row by row, in the dtype of `values`."""
        return self.values.transpose(1, 2).reshape(-1, self.num_inputs)[: self.num_outputs].contiguous()


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix in 8-bit floats (e4m3) with a float32 scale for each output: weight = values * scales.

    `dtype` is that of the rows it multiplies.
    """

    values_NK: Tensor
    scales_N: Tensor
    dtype: torch.dtype

    def rows(self) -> Tensor:
        """[N, K] in `dtype`."""
        return (self.values_NK.float() * self.scales_N.unsqueeze(1)).to(self.dtype)


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """Several forms, one below the other: a fused matrix of which some parts are quantized otherwise, or not at all."""

    parts: tuple[Weight, ...]

    @property
    def num_outputs(self) -> int:
        return sum(num_outputs(part) for part in self.parts)

    @property
    def num_inputs(self) -> int:
        return num_inputs(self.parts[0])

    def rows(self) -> Tensor:
        """[N, K] in `dtype`."""
        return torch.cat([part if isinstance(part, Tensor) else part.rows() for part in self.parts])


Weight: TypeAlias = (
    Tensor | PackedWeight | QuantizedWeight | GroupedWeight | GroupedFloatWeight | ReorderedWeight | StackedWeight
)
"""A plain matrix [N, K], a packed one, one in 8-bit floats, one of integers or of floats in groups, or one made of
these."""


def num_outputs(weight: Weight) -> int:
    match weight:
        case Tensor():
            return weight.shape[0]
        case QuantizedWeight():
            return weight.values_NK.shape[0]
        case _:
            return weight.num_outputs


def num_inputs(weight: Weight) -> int:
    match weight:
        case Tensor():
            return weight.shape[1]
        case QuantizedWeight():
            return weight.values_NK.shape[1]
        case _:
            return weight.num_inputs


def to_device(weight: Weight, device: torch.device) -> Weight:
    """The same form there."""
    match weight:
        case Tensor():
            return weight.to(device)
        case PackedWeight():
            return replace(weight, values=weight.values.to(device))
        case QuantizedWeight():
            return replace(weight, values_NK=weight.values_NK.to(device), scales_N=weight.scales_N.to(device))
        case GroupedWeight():
            return _grouped_to(weight, device)
        case GroupedFloatWeight():
            return replace(weight, codes=weight.codes.to(device), scales_NG=weight.scales_NG.to(device))
        case ReorderedWeight():
            return replace(weight, weight=_grouped_to(weight.weight, device), order_P=weight.order_P.to(device))
        case StackedWeight():
            return StackedWeight(tuple(to_device(part, device) for part in weight.parts))


def _grouped_to(weight: GroupedWeight, device: torch.device) -> GroupedWeight:
    minimums_NG = None if weight.minimums_NG is None else weight.minimums_NG.to(device)
    return replace(
        weight, codes=weight.codes.to(device), scales_NG=weight.scales_NG.to(device), minimums_NG=minimums_NG
    )


def stack_weights(parts: Sequence[Weight]) -> Weight:
    """One below the other, exactly; in one form if the parts allow it."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, GroupedWeight) for part in parts):
        return stack_grouped([part for part in parts if isinstance(part, GroupedWeight)])
    floats = [part for part in parts if isinstance(part, GroupedFloatWeight)]
    if len(floats) == len(parts) and len({part.kind for part in floats}) == 1:
        return stack_grouped_floats(floats)
    scaled = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(scaled) == len(parts):
        values_NK, scales_N = torch.cat([p.values_NK for p in scaled]), torch.cat([p.scales_N for p in scaled])
        return QuantizedWeight(values_NK, scales_N, scaled[0].dtype)
    plain = [part for part in parts if isinstance(part, Tensor)]
    if len(plain) == len(parts):
        return torch.cat(plain)
    ordered = [part for part in parts if isinstance(part, ReorderedWeight)]
    if len(ordered) == len(parts) and all(torch.equal(part.order_P, ordered[0].order_P) for part in ordered):
        whole = stack_grouped([part.weight for part in ordered])
        return ReorderedWeight(whole, ordered[0].order_P, ordered[0].num_inputs)
    return StackedWeight(tuple(parts))


@dataclass(frozen=True, slots=True)
class Matrix:
    """What a product is made with: x weightᵀ + bias."""

    weight_NK: Tensor | QuantizedWeight | PackedCodes
    bias_N: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        weight = self.weight_NK
        return weight.num_outputs if isinstance(weight, PackedCodes) else num_outputs(weight)

    @property
    def num_inputs(self) -> int:
        weight = self.weight_NK
        return weight.num_inputs if isinstance(weight, PackedCodes) else num_inputs(weight)

    def outputs_from(self, first: int) -> Matrix:
        """Outputs [first, N) alone, over the same memory."""
        weight, bias_N = self.weight_NK, self.bias_N
        rest: Tensor | QuantizedWeight | PackedCodes
        match weight:
            case QuantizedWeight():
                rest = QuantizedWeight(weight.values_NK[first:], weight.scales_N[first:], weight.dtype)
            case PackedCodes():
                rest = weight.outputs_from(first)
            case _:
                rest = weight[first:]
        return Matrix(rest, None if bias_N is None else bias_N[first:])


def interleave_gate_up(gate_IK: Tensor, up_IK: Tensor) -> Tensor:
    """[2 I, K] with rows that alternate gate and up, as GPU kernels read them; of a bias, [2 I]."""
    return torch.stack([gate_IK, up_IK], 1).flatten(0, 1)


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, and float32 scales [M] by which the largest element of each row becomes e4m3's largest number."""
    wide_MK = x_MK.float()
    scales_M = (wide_MK.abs().amax(dim=-1) * (1 / torch.finfo(FP8).max)).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide_MK * (1 / scales_M).unsqueeze(-1)).to(FP8), scales_M


def quantize_weight(weight_NK: Tensor) -> QuantizedWeight:
    """Some rows at a time: what is computed in float32 on the way takes eight times the memory of its result."""
    N, K = weight_NK.shape
    values_NK = torch.empty(N, K, dtype=FP8, device=weight_NK.device)
    scales_N = torch.empty(N, dtype=torch.float32, device=weight_NK.device)
    step = max(1, _QUANTIZED_AT_ONCE // K)
    for rows in (slice(first, first + step) for first in range(0, N, step)):
        values_NK[rows], scales_N[rows] = quantize_rows(weight_NK[rows])
    return QuantizedWeight(values_NK, scales_N, weight_NK.dtype)


def to_fp8(x: Tensor) -> Tensor:
    """Without a scale: what is beyond e4m3's largest number becomes that."""
    largest = torch.finfo(FP8).max
    return x.clamp(-largest, largest).to(FP8)


def pack_weight(weight_NK: Tensor) -> PackedWeight | None:
    """None where there is no native product for this device, type or shape."""
    native = load_native(weight_NK.dtype) if weight_NK.device.type == "cpu" else None
    N, K = weight_NK.shape
    if native is None:
        return None
    narrow_NK = narrowed(weight_NK) if native.linear_by_bf16 is not None else None
    stored_NK = weight_NK.contiguous() if narrow_NK is None else narrow_NK
    layout, packer = native_layout(stored_NK.dtype), load_native(stored_NK.dtype)
    if layout is None or packer is None or K % 2:
        return None
    panel, step = layout
    values = huge_pages((-(-N // panel), K // step, panel, step), stored_NK.dtype)
    packer.pack_weight(stored_NK.data_ptr(), values.data_ptr(), N, K)
    return PackedWeight(values, N, weight_NK.dtype)


def narrowed(tensor: Tensor) -> Tensor | None:
    """A float32 tensor as bfloat16, or None where that would change a number."""
    if tensor.dtype != torch.float32:
        return None
    narrow = tensor.to(torch.bfloat16)
    return narrow.contiguous() if torch.equal(narrow.float(), tensor) else None


@functools.cache
def native_layout(dtype: torch.dtype) -> tuple[int, int] | None:
    """(outputs of a panel, step) of the native product, found by packing a small matrix."""
    native = load_native(dtype)
    if native is None:
        return None
    panel, K = 2 * native.vector_length, 8
    weight_NK = torch.arange(2 * panel * K, dtype=torch.float32).remainder(251).to(dtype).view(2 * panel, K)
    packed = torch.empty(2 * panel * K, dtype=dtype)
    native.pack_weight(weight_NK.data_ptr(), packed.data_ptr(), 2 * panel, K)
    for step in (1, 2, 4):
        if torch.equal(weight_NK.view(2, panel, K // step, step).transpose(1, 2).flatten(), packed):
            return panel, step
    return None


def huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory in huge pages, which cost fewer look-ups while weights are read: 8.7 ms instead of 10.4 ms
    (a decode step's products of SmolLM2, bfloat16, batch 16, EPYC of the fifth generation, 2 threads, 2026-11)."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    memory = mmap.mmap(-1, max(1, size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize).view(shape)
