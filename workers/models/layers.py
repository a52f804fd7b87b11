"""The building blocks of a transformer, split over ranks by columns, rows and vocabulary.

Plain callables over plain tensors: at batch 1 the calls of `torch.nn.Module` alone take a millisecond per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.operations import AddRmsNorm

if TYPE_CHECKING:
    from tensorweave.workers.gang.comm import Comm
    from tensorweave.workers.models.forward_inputs import ForwardInputs

# T tokens, D hidden size, R rows of logits, V vocabulary of this rank, J inputs of this rank


@dataclass(frozen=True, slots=True)
class RmsNorm:
    add_rms_norm: AddRmsNorm
    weight_D: Tensor
    epsilon: float
    offset: float = 0.0

    def __call__(self, x_TD: Tensor, update_TD: Tensor | None = None) -> Tensor:
        """Add the update to x in place; return x normalised."""
        return self.add_rms_norm(x_TD, update_TD, self.weight_D, self.epsilon, self.offset)


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """Outputs are split: each rank computes its own from the whole input, and nothing is exchanged."""

    linear: Linear

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor:
        return self.linear(x_TD)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """Inputs are split: ranks sum their parts. The bias is on rank 0 alone, so that it is added once."""

    linear: Linear
    comm: Comm

    def __call__(self, x_TJ: Tensor, inputs: ForwardInputs) -> Tensor:
        return self.comm.all_reduce(self.linear(x_TJ))


@dataclass(frozen=True, slots=True)
class AdaptedColumnLinear:
    """A `ColumnLinear` to which the adapters of a step's rows add; they know it by the number `site`."""

    linear: Linear
    site: int

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor:
        return inputs.updates.add(self.site, x_TD, self.linear(x_TD))


@dataclass(frozen=True, slots=True)
class AdaptedRowLinear:
    """The same of a `RowLinear`. Each rank adds from its own inputs, and what they add is summed with the products."""

    linear: Linear
    comm: Comm
    site: int

    def __call__(self, x_TJ: Tensor, inputs: ForwardInputs) -> Tensor:
        return self.comm.all_reduce(inputs.updates.add(self.site, x_TJ, self.linear(x_TJ)))


ColumnForm: TypeAlias = ColumnLinear | AdaptedColumnLinear
RowForm: TypeAlias = RowLinear | AdaptedRowLinear


@dataclass(frozen=True, slots=True)
class VocabEmbedding:
    """The whole table."""

    weight_VD: Tensor

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        return F.embedding(token_ids_T, self.weight_VD)


@dataclass(frozen=True, slots=True)
class SplitVocabEmbedding:
    """Rows [first, first + V) of the table are here; ranks sum their parts, and tokens of other ranks add zero."""

    weight_VD: Tensor
    first: int
    comm: Comm

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        local_T = token_ids_T - self.first
        is_other_T = (local_T < 0) | (local_T >= self.weight_VD.shape[0])
        x_TD = F.embedding(local_T.masked_fill(is_other_T, 0), self.weight_VD)
        return self.comm.all_reduce(x_TD.masked_fill_(is_other_T.unsqueeze(1), 0))


@dataclass(frozen=True, slots=True)
class OutputHead:
    """Logits of each rank's part of the vocabulary, gathered to all of it on every rank, in float32."""

    linear: Linear
    sizes: tuple[int, ...]
    comm: Comm

    def __call__(self, x_RD: Tensor) -> Tensor:
        return self.comm.gather_columns(self.linear.to_float32(x_RD), self.sizes)
