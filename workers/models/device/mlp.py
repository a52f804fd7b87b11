"""The MLPs of a device engine's layers, plain or mixtures of experts, and how a transformer's are taken over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.linear.reference import (
    GroupedFloatLinear,
    GroupedLinear,
    Linear,
    QuantizedLinear,
    TorchLinear,
)
from tensorweave.kernels.mixture.reference import SILU
from tensorweave.kernels.mixture.stack import ExpertStack, StackedExperts
from tensorweave.kernels.weights import Matrix, PackedCodes, QuantizedWeight, Weight, interleave_gate_up
from tensorweave.workers.models.decoder_layer import GatedMlp, Mlp
from tensorweave.workers.models.device.folding import scaled
from tensorweave.workers.models.mixture import Mixture

UNKNOWN_FORM: Final = "matrices whose parts are quantized in several ways, in act-order or in groups of less than 32"


@dataclass(frozen=True, slots=True)
class DeviceMlp:
    """Rows of `gate_up` (and its bias) alternate gate and up."""

    gate_up: Matrix
    down: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.gate_up, self.down

    @property
    def gated_width(self) -> int:
        return self.gate_up.num_outputs // 2


@dataclass(frozen=True, slots=True)
class SharedMlp:
    """For all tokens, times the sigmoid of a number of each token's own."""

    mlp: DeviceMlp
    gate: Matrix


@dataclass(frozen=True, slots=True)
class DeviceMixture:
    router: Matrix
    experts: ExpertStack
    shared: tuple[SharedMlp, ...]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Without those of experts that are routed."""
        return self.router, *(matrix for each in self.shared for matrix in (*each.mlp.matrices, each.gate))


def missing_of_mlp(mlp: Mlp) -> str | None:
    """What the kernels do not compute of it, or None."""
    match mlp:
        case GatedMlp():
            if not can_take_matrix(mlp.gate_up.linear) or not can_take_matrix(mlp.down.linear):
                return UNKNOWN_FORM
            return None if mlp.activate is silu_mul else "gates other than silu"
        case Mixture():
            return _missing_of_mixture(mlp)
        case _:
            return f"a {type(mlp).__name__} in place of an MLP"


def _missing_of_mixture(mixture: Mixture) -> str | None:
    group = mixture.routed.experts.group
    if group.swiglu != SILU:
        return "experts whose gates are not silu"
    if any(not isinstance(linear, TorchLinear) for expert in group.experts for linear in (expert.gate_up, expert.down)):
        return "experts with quantized weights"
    linears = [linear for expert in group.experts for linear in (expert.gate_up, expert.down)]
    if any(isinstance(linear, TorchLinear) and linear.bias_N is not None for linear in linears):
        return "experts with biases"
    return next((m for m in (missing_of_mlp(shared.mlp) for shared in mixture.shared) if m is not None), None)


def take_mlp(mlp: Mlp, factor: float = 1.0) -> DeviceMlp | DeviceMixture:
    """Interleaves gate and up rows in place. What a plain one returns is multiplied by `factor`."""
    match mlp:
        case GatedMlp():
            return DeviceMlp(_take_gate_up(mlp.gate_up.linear), take_matrix(scaled(mlp.down.linear, factor)))
        case Mixture():
            assert isinstance(mlp.routed.experts, StackedExperts)
            assert factor == 1.0
            shared = []
            for each in mlp.shared:
                plain = take_mlp(each.mlp)
                assert isinstance(plain, DeviceMlp)
                shared.append(SharedMlp(plain, take_matrix(each.gate.linear)))
            return DeviceMixture(take_matrix(mlp.routed.router), mlp.routed.experts.stack, tuple(shared))
        case _:
            raise AssertionError(f"no form of {type(mlp).__name__} for a device engine")


def can_take_matrix(linear: Linear) -> bool:
    match linear:
        case TorchLinear() | QuantizedLinear():
            return True
        case GroupedLinear() | GroupedFloatLinear():
            return PackedCodes.can_pack(linear.weight)
        case _:
            return False


def weight_of(linear: Linear) -> Weight:
    match linear:
        case TorchLinear():
            return linear.weight_NK
        case QuantizedLinear() | GroupedLinear() | GroupedFloatLinear():
            return linear.weight
        case _:
            raise AssertionError(f"no form of {type(linear).__name__} for a device engine")


def take_matrix(linear: Linear) -> Matrix:
    match linear:
        case TorchLinear():
            return Matrix(linear.weight_NK, linear.bias_N)
        case QuantizedLinear():
            return Matrix(linear.weight, linear.bias_N)
        case GroupedLinear() | GroupedFloatLinear():
            return Matrix(PackedCodes.of(linear.weight), linear.bias_N)
        case _:
            raise AssertionError(f"no form of {type(linear).__name__} for a device engine")


def _take_gate_up(linear: Linear) -> Matrix:
    """Gate rows, then up rows, to rows that alternate; in place but for weights in groups."""
    if isinstance(linear, GroupedLinear | GroupedFloatLinear):
        weight, bias_N = linear.weight, linear.bias_N
        order_N = interleave_gate_up(*torch.arange(weight.num_outputs, device=weight.codes.device).chunk(2))
        return Matrix(PackedCodes.of(weight.reordered(order_N)), None if bias_N is None else bias_N[order_N])
    return _interleave(take_matrix(linear))


def _interleave(gate_up: Matrix) -> Matrix:
    weight = gate_up.weight_NK
    assert not isinstance(weight, PackedCodes)
    tensors = (weight.values_NK, weight.scales_N) if isinstance(weight, QuantizedWeight) else (weight,)
    for tensor in (*tensors, gate_up.bias_N):
        if tensor is not None:
            _interleave_halves(tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)
    return gate_up


def _interleave_halves(rows: Tensor) -> None:
    rows.copy_(interleave_gate_up(*rows.chunk(2)))
