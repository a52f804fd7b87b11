"""`ExpertStack`: the experts of a layer as one tensor each for their gates and ups, and for their downs; in torch.

GPU kernels read them: see `kernels.mixture.triton`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.linear.reference import Linear, TorchLinear
from tensorweave.kernels.mixture.reference import SILU, EachExpert, ExpertGroup, Experts
from tensorweave.kernels.mixture.routing import Routing, route

# T tokens, E experts, S chosen experts of a token, D hidden size, I intermediate width of an expert


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Rows of `gate_up` alternate gate and up; the activation is silu(gate) * up. Contiguous, of one type."""

    gate_up_E2ID: Tensor
    down_EDI: Tensor
    routing: Routing

    @property
    def num_experts(self) -> int:
        return self.down_EDI.shape[0]

    @property
    def width(self) -> int:
        return self.down_EDI.shape[2]


def add_experts(x_TD: Tensor, logits_TE: Tensor, stack: ExpertStack, sum_TD: Tensor) -> None:
    """sum += the weighted sum of what each token's chosen experts return, in float32 in the order of the experts'
    numbers, rounded once. An expert's output is rounded to the type of x before."""
    experts_TS, weights_TS = route(logits_TE, stack.routing)
    update_TD = torch.zeros_like(sum_TD, dtype=torch.float32)
    for expert in range(stack.num_experts):
        rows_R, places_R = torch.nonzero(experts_TS == expert, as_tuple=True)
        if not len(rows_R):
            continue
        gate_up_R2I = F.linear(x_TD[rows_R], stack.gate_up_E2ID[expert]).float()
        gated_RI = (F.silu(gate_up_R2I[:, 0::2]) * gate_up_R2I[:, 1::2]).to(x_TD.dtype)
        part_RD = F.linear(gated_RI, stack.down_EDI[expert]).float()
        update_TD.index_add_(0, rows_R, part_RD * weights_TS[rows_R, places_R].unsqueeze(1))
    sum_TD.copy_(sum_TD.float() + update_TD)


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """An `Experts` whose products are in one stack, for a device engine to take over. Its group names no experts."""

    group: ExpertGroup
    stack: ExpertStack

    def __call__(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        add_experts(x_TD, logits_TE, self.stack, out_TD)
        return out_TD


def stack_experts(group: ExpertGroup) -> Experts:
    """Copies the group's tensors. Experts with biases, in other forms than plain matrices, with gates other than silu,
    or not all of a layer's stay as they are."""
    gate_up = [expert.gate_up.weight_NK for expert in group.experts if _is_plain(expert.gate_up)]
    down = [expert.down.weight_NK for expert in group.experts if _is_plain(expert.down)]
    E = group.num_experts
    if len(gate_up) != E or len(down) != E or group.swiglu != SILU:
        return EachExpert(group)
    rows, D = gate_up[0].shape
    gate_up_E2ID, down_EDI = gate_up[0].new_empty(E, rows, D), down[0].new_empty(E, D, rows // 2)
    for i in range(E):
        gate_ID, up_ID = gate_up[i].chunk(2)
        gate_up_E2ID[i, 0::2], gate_up_E2ID[i, 1::2], down_EDI[i] = gate_ID, up_ID, down[i]
    return StackedExperts(replace(group, experts=()), ExpertStack(gate_up_E2ID, down_EDI, group.routing))


def _is_plain(linear: Linear) -> TypeGuard[TorchLinear]:
    return isinstance(linear, TorchLinear) and linear.bias_N is None
