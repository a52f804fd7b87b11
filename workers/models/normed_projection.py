"""`NormedProjection`: queries, keys and values, the first two behind a norm over all heads together (OLMo 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.norm.native import NativeSplitNorm
from tensorweave.kernels.norm.reference import SplitNorm
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.layers import ColumnForm

# T tokens, D hidden size, J and I elements of this rank's queries and keys


@dataclass(frozen=True, slots=True)
class PartNorm:
    """This rank's part of a norm's weight; `width` is that of all ranks together."""

    weight: Tensor
    width: int


@dataclass(frozen=True, slots=True)
class NormedProjection:
    """A mean over all heads crosses ranks: these sum their squares, two numbers a token.

    Where KV heads are on several ranks, `owned_keys` are the elements of the keys that this rank counts.
    """

    projection: ColumnForm
    query: PartNorm
    key: PartNorm
    owned_keys: slice
    epsilon: float
    norm: SplitNorm | NativeSplitNorm
    comm: Comm

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor:
        heads = self.projection(x_TD, inputs)
        J, I = len(self.query.weight), len(self.key.weight)  # noqa: E741
        query_TJ, key_TI = heads[:, :J], heads[:, J : J + I]
        squares = torch.stack([self.norm.squares(query_TJ), self.norm.squares(key_TI[:, self.owned_keys])])
        query_T, key_T = self.comm.all_reduce(squares)
        self.norm.scale(query_TJ, query_T, self.query.weight, self.query.width, self.epsilon)
        self.norm.scale(key_TI, key_T, self.key.weight, self.key.width, self.epsilon)
        return heads
