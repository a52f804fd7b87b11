"""All experts of a layer in one native call: routing, products and their weighted sum."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.kernels.linear.grouped import PackedGroupedLinear
from tensorweave.kernels.linear.native import PackedLinear
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.mixture.reference import EachExpert, ExpertGroup, Experts
from tensorweave.kernels.native.library import NativeKernels
from tensorweave.kernels.native.structures import Expert, Matrix, MatrixForm, Mixture
from tensorweave.kernels.weights import huge_pages

# T tokens, E experts, D hidden size

_MOST_EXPERTS: Final = 1024  # MOST_EXPERTS in mixture.h


class Scratch:
    """Working memory that grows to the largest step seen. All layers of a model take turns with it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> int:
        """Address of at least `size` bytes, valid until the next call."""
        if size > len(self._bytes):
            self._bytes = huge_pages((size,), torch.uint8)
        return self._bytes.data_ptr()


class NativeExperts:
    """A row's result does not depend on the other rows: it has the same bits in any batch."""

    def __init__(self, native: NativeKernels, mix: Any, group: ExpertGroup, scratch: Scratch) -> None:
        self.group = group  # what the structures point to
        self._mix = mix
        self._measure = native.mixture_scratch
        self._element_bytes = native.dtype.itemsize
        self._scratch = scratch
        self._experts = (Expert * len(group.experts))(
            *(Expert(_matrix(each.gate_up), _matrix(each.down)) for each in group.experts)
        )
        gate_up = self._experts[0].gate_up
        self._mixture = Mixture(
            experts=ctypes.addressof(self._experts),
            num_experts=group.num_experts,
            first=group.first,
            num_here=len(group.experts),
            num_chosen=group.routing.num_chosen,
            hidden=gate_up.num_inputs,
            width=gate_up.num_outputs // 2,
            is_renormalized=group.routing.is_renormalized,
            is_rounded=group.routing.is_rounded,
            alpha=group.swiglu.alpha,
            limit=group.swiglu.limit,
            shift=group.swiglu.shift,
        )

    def __call__(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        assert x_TD.is_contiguous()
        assert logits_TE.is_contiguous()
        assert logits_TE.shape[1] == self.group.num_experts
        out_TD = torch.empty_like(x_TD)
        mixture, T = ctypes.addressof(self._mixture), len(x_TD)
        scratch = self._scratch.reserve(self._measure(mixture, T, self._element_bytes))
        self._mix(mixture, x_TD.data_ptr(), logits_TE.data_ptr(), out_TD.data_ptr(), scratch, T)
        return out_TD


class MakeNativeExperts:
    """Makes the experts of all layers of one model."""

    def __init__(self, native: NativeKernels) -> None:
        self._native = native
        self._scratch = Scratch()

    def __call__(self, group: ExpertGroup) -> Experts:
        """Experts whose weights are not all packed alike are computed one after the other."""
        mix = self._choose(group) if group.num_experts <= _MOST_EXPERTS else None
        if mix is None:
            return EachExpert(group)
        return NativeExperts(self._native, mix, group, self._scratch)

    def _choose(self, group: ExpertGroup) -> Any | None:
        """A kernel for the form of the weights."""
        forms = {(_form(each.gate_up), _form(each.down)) for each in group.experts}
        gate_up, down = forms.pop()
        if forms or gate_up is None or down is None or gate_up.kind != down.kind:
            return None
        return self._native.mixture_by_bf16 if gate_up.kind == MatrixForm.NARROW else self._native.mixture


@dataclass(frozen=True, slots=True)
class _Form:
    """What must be alike in all experts: how rows are prepared for the product."""

    kind: int
    block: int
    row_bytes: int


def _form(linear: Linear) -> _Form | None:
    if not isinstance(linear, PackedLinear | PackedGroupedLinear):
        return None
    matrix = linear.matrix
    return _Form(matrix.form, matrix.block, matrix.row_bytes)


def _matrix(linear: Linear) -> Matrix:
    assert isinstance(linear, PackedLinear | PackedGroupedLinear)
    return linear.matrix
