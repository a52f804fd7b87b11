"""`Operations`: the table of what a model's layers are computed with, chosen once at load for a device, a type and a
head dim.

Each operation has a folder here with its forms: `reference` (torch, on any device, and what the others are tested
against), `native` (C, on CPUs) and `triton` (GPUs). A new form is a new file, its test, and a line in
`choose_operations`. A kernel that fuses several of these (norm, product and activation, say) replaces a whole layer
instead: see `DecoderStack` in `workers/models/stack.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.activation.native import NativeGeluMul, NativeSiluMul
from tensorweave.kernels.activation.reference import gelu_mul, silu_mul
from tensorweave.kernels.argmax.native import NativeArgmax
from tensorweave.kernels.argmax.reference import argmax
from tensorweave.kernels.attention.backend import AttentionBackend, AttentionShape
from tensorweave.kernels.attention.native import NativeAttention
from tensorweave.kernels.attention.torch_backend import TorchAttention
from tensorweave.kernels.device_operations import DeviceOperations
from tensorweave.kernels.heads.kv_slots import KvSlots
from tensorweave.kernels.heads.native import NativePlaceHeads
from tensorweave.kernels.heads.reference import HeadNorms, place_heads
from tensorweave.kernels.linear.native import MakeNativeLinear
from tensorweave.kernels.linear.reference import Linear, make_linear
from tensorweave.kernels.lora.native import NativeAdapters
from tensorweave.kernels.lora.reference import AdapterKernels, ReferenceAdapters
from tensorweave.kernels.mixture.gated_sum import NativeAddGated, add_gated
from tensorweave.kernels.mixture.native import MakeNativeExperts
from tensorweave.kernels.mixture.reference import EachExpert, ExpertGroup, Experts
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.norm.native import NativeAddRmsNorm, NativeSplitNorm
from tensorweave.kernels.norm.reference import SplitNorm, add_rms_norm
from tensorweave.kernels.reference_device_operations import ReferenceOperations
from tensorweave.kernels.weights import Weight

# T tokens, D width, I intermediate width, X = N + 2 K heads, N of them queries, H head dim, W rotated elements
# R rows, V vocabulary
# M rows, N outputs, K inputs of a product; B blocks, C planes of a block, P tokens per block

MakeLinear = Callable[[Weight, Tensor | None], Linear]
"""(weight[N, K], bias[N] or None): x[M, K] to x weightᵀ + bias."""
GatedActivation = Callable[[Tensor], Tensor]
"""[T, 2 I], the gate in the first half, to activation(gate) * up: [T, I]."""
MakeExperts = Callable[[ExpertGroup], Experts]
"""The mixture of experts of one layer: see `kernels.mixture.reference.Experts`."""
AddGated = Callable[[Tensor, Tensor, Tensor], None]
"""(out[T, D], gate[T, 1], x[T, D]): out += sigmoid(gate) * x, in place."""
MakeAttention = Callable[[AttentionShape], AttentionBackend]
Argmax = Callable[[Tensor], Tensor]
"""See `kernels.argmax.reference.argmax`: of float32 logits [R, V], contiguous."""


class AddRmsNorm(Protocol):
    """x += update, in place, where there is one; returns x / rms(x) * (weight + offset)."""

    def __call__(
        self, x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, epsilon: float, offset: float = 0.0
    ) -> Tensor: ...


class PlaceHeads(Protocol):
    """See `kernels.heads.reference.place_heads`."""

    def __call__(
        self,
        heads_TXH: Tensor,
        rope_table_TW: Tensor,
        cache_BCPH: Tensor,
        slots: KvSlots,
        norms: HeadNorms | None,
        *,
        has_neighbours: bool = False,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Operations:
    make_linear: MakeLinear
    add_rms_norm: AddRmsNorm
    split_norm: SplitNorm | NativeSplitNorm
    silu_mul: GatedActivation
    gelu_mul: GatedActivation
    place_heads: PlaceHeads
    make_attention: MakeAttention
    make_experts: MakeExperts
    add_gated: AddGated
    adapters: AdapterKernels
    has_native_attention: bool = False


def choose_operations(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, has_plain_attention: bool = False
) -> Operations:
    """The fastest form of each operation on this machine, for a model whose rows have this type. With
    `has_plain_attention`, attention is in torch all the same."""
    native = load_native(dtype) if device.type == "cpu" else None
    reference = reference_operations(device, dtype)
    if native is None:
        return reference
    has_native_attention = NativeAttention.fits(native, head_dim) and not has_plain_attention
    return Operations(
        make_linear=MakeNativeLinear(native),
        add_rms_norm=NativeAddRmsNorm(native),
        split_norm=NativeSplitNorm(native),
        silu_mul=NativeSiluMul(native),
        gelu_mul=NativeGeluMul(native),
        place_heads=NativePlaceHeads(native) if NativePlaceHeads.fits(native, head_dim) else reference.place_heads,
        make_attention=partial(NativeAttention, native) if has_native_attention else reference.make_attention,
        make_experts=MakeNativeExperts(native),
        add_gated=NativeAddGated(native),
        adapters=NativeAdapters(native),
        has_native_attention=has_native_attention,
    )


def reference_operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """All operations in torch."""
    return Operations(
        make_linear=make_linear,
        add_rms_norm=add_rms_norm,
        split_norm=SplitNorm(),
        silu_mul=silu_mul,
        gelu_mul=gelu_mul,
        place_heads=place_heads,
        make_attention=partial(TorchAttention, device, dtype),
        make_experts=EachExpert,
        add_gated=add_gated,
        adapters=ReferenceAdapters(device),
    )


def choose_device_operations(device: torch.device) -> DeviceOperations:
    """The kernels of steps that stay on a device."""
    if device.type == "cuda":
        from tensorweave.kernels.triton_operations import TritonOperations  # there is no Triton without a GPU

        return TritonOperations(device)
    return ReferenceOperations()


def choose_split_operations(device: torch.device) -> DeviceOperations:
    """The same for one rank's share of a model."""
    if device.type == "cuda":
        from tensorweave.kernels.split_operations import SplitOperations  # as above

        return SplitOperations(device)
    return ReferenceOperations()


@cache
def choose_argmax(device: torch.device) -> Argmax:
    """Logits are float32 whatever the model's type, so that this is chosen for a device alone."""
    native = load_native(torch.float32) if device.type == "cpu" else None
    return argmax if native is None or native.argmax is None else NativeArgmax(native.argmax)
