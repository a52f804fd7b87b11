"""Experts that a router chooses token by token, one after the other, each by its own products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Protocol

import torch
from torch import Tensor

from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.mixture.routing import Routing, route

# T tokens, E experts, S chosen experts of a token, D hidden size, I intermediate width, R rows of one expert


@dataclass(frozen=True, slots=True)
class Swiglu:
    """The gated activation of an expert: gate * sigmoid(alpha * gate) * (up + shift), of a gate that is at most `limit`
    and an `up` within [-limit, limit]. `SILU` is silu(gate) * up; gpt-oss's experts have other numbers."""

    alpha: float = 1.0
    limit: float = inf
    shift: float = 0.0

    def __call__(self, gate_up_R2I: Tensor) -> Tensor:
        """[R, 2 I] with the gate in the first half to [R, I], computed in float32 and rounded once."""
        gate_RI, up_RI = gate_up_R2I.float().chunk(2, dim=-1)
        gate_RI, up_RI = gate_RI.clamp(max=self.limit), up_RI.clamp(-self.limit, self.limit)
        return (gate_RI * torch.sigmoid(self.alpha * gate_RI) * (up_RI + self.shift)).to(gate_up_R2I.dtype)


SILU: Final = Swiglu()


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's part on this rank. `gate_up` returns the gate in the first half."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The experts of one layer that this rank has, of `num_experts` in all: those with numbers from `first` on."""

    experts: tuple[Expert, ...]
    first: int
    num_experts: int
    routing: Routing
    swiglu: Swiglu


class Experts(Protocol):
    """(x[T, D], router logits[T, E]) to the weighted sum of what each token's chosen experts on this rank return,
    [T, D]. Summed in float32 in the order of the experts' numbers, and rounded once. One caller at a time."""

    @property
    def group(self) -> ExpertGroup: ...

    def __call__(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class EachExpert:
    """Takes experts whose products are of any form and on any device. A row's result does not depend on the other rows
    where that is so of the products."""

    group: ExpertGroup

    def __call__(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        group = self.group
        experts_TS, weights_TS = route(logits_TE, group.routing)
        num_chosen = experts_TS.shape[1]
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, places_R in zip(group.experts, self._places(experts_TS), strict=True):
            if not len(places_R):
                continue
            rows_R = places_R // num_chosen
            part_RD = expert.down.to_float32(group.swiglu(expert.gate_up(x_TD[rows_R])))
            out_TD.index_add_(0, rows_R, part_RD * weights_TS.flatten()[places_R].unsqueeze(1))
        return out_TD.to(x_TD.dtype)

    def _places(self, experts_TS: Tensor) -> Sequence[Tensor]:
        """Where in experts[T, S], flattened, each expert of this rank stands."""
        chosen = experts_TS.flatten()
        counts = chosen.bincount(minlength=self.group.num_experts).tolist()
        by_expert = torch.split(chosen.argsort(stable=True), counts)
        return by_expert[self.group.first : self.group.first + len(self.group.experts)]
