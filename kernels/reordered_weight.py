"""`ReorderedWeight`: a matrix whose inputs are in another order than those of the rows that it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.grouped_weight import GroupedWeight

# N outputs, K inputs, P places: inputs in their new order


@dataclass(frozen=True, slots=True)
class ReorderedWeight:
    """`weight` multiplies the inputs in the order `order_P`: place p takes input order_P[p], or 0 if that is
    `num_inputs`. Inputs of one group, which lie apart in checkpoints with act-order, are neighbours so."""

    weight: GroupedWeight
    order_P: Tensor
    num_inputs: int

    @property
    def num_outputs(self) -> int:
        return self.weight.num_outputs

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def has_zeros(self) -> bool:
        return bool((self.order_P >= self.num_inputs).any())

    def rows(self) -> Tensor:
        """[N, K] in `dtype`, with the inputs in the order of the rows that it multiplies."""
        is_input_P = self.order_P < self.num_inputs
        rows_NK = torch.empty(self.num_outputs, self.num_inputs, dtype=self.dtype)
        rows_NK[:, self.order_P[is_input_P]] = self.weight.rows()[:, is_input_P]
        return rows_NK
