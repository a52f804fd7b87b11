"""The MLPs of a device engine's layers, plain or mixtures of experts, and how a transformer's are taken over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.linear.reference import Linear, QuantizedLinear, TorchLinear
from tensorweave.kernels.mixture.reference import SILU
from tensorweave.kernels.mixture.stack import ExpertStack, StackedExperts
from tensorweave.kernels.weights import Matrix, QuantizedWeight, interleave_gate_up
from tensorweave.workers.models.decoder_layer import GatedMlp, Mlp
from tensorweave.workers.models.mixture import Mixture


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


def take_mlp(mlp: Mlp) -> DeviceMlp | DeviceMixture:
    """Interleaves gate and up rows in place."""
    match mlp:
        case GatedMlp():
            return DeviceMlp(_interleave(take_matrix(mlp.gate_up.linear)), take_matrix(mlp.down.linear))
        case Mixture():
            assert isinstance(mlp.routed.experts, StackedExperts)
            shared = []
            for each in mlp.shared:
                plain = take_mlp(each.mlp)
                assert isinstance(plain, DeviceMlp)
                shared.append(SharedMlp(plain, take_matrix(each.gate)))
            return DeviceMixture(take_matrix(mlp.routed.router), mlp.routed.experts.stack, tuple(shared))
        case _:
            raise AssertionError(f"no form of {type(mlp).__name__} for a device engine")


def take_matrix(linear: Linear) -> Matrix:
    match linear:
        case TorchLinear():
            return Matrix(linear.weight_NK, linear.bias_N)
        case QuantizedLinear():
            return Matrix(linear.weight, linear.bias_N)
        case _:
            raise AssertionError(f"no form of {type(linear).__name__} for a device engine")


def _interleave(gate_up: Matrix) -> Matrix:
    """Gate rows, then up rows, to rows that alternate; in place."""
    weight = gate_up.weight_NK
    tensors = (weight.values_NK, weight.scales_N) if isinstance(weight, QuantizedWeight) else (weight,)
    for tensor in (*tensors, gate_up.bias_N):
        if tensor is not None:
            _interleave_halves(tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)
    return gate_up


def _interleave_halves(rows: Tensor) -> None:
    rows.copy_(interleave_gate_up(*rows.chunk(2)))
