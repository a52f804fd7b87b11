"""`SiteStack`: what the adapters on a device add to one product, adapter beside adapter; in torch.

GPU kernels read it: see `kernels.lora.triton`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# T tokens, K inputs and N outputs of the product, P parts of its outputs, L places for adapters, R most rank


@dataclass(frozen=True, slots=True)
class SiteStack:
    """An adapter adds B A x to its part of the outputs, with the A of that part.

    `bounds` are where the parts behind the first begin, or parts alternate output by output (`is_interleaved`).
    `ranks_L` is int32: rows of A and columns of B from there on are zeros, or, at rank 0, any numbers. What `b` has for
    outputs is scaled, and all of it is finite, also where there is no adapter: kernels may multiply zeros by it.
    """

    a_PLRK: Tensor
    b_NLR: Tensor
    ranks_L: Tensor
    bounds: tuple[int, ...]
    is_interleaved: bool = False

    @property
    def num_parts(self) -> int:
        return self.a_PLRK.shape[0]

    @property
    def max_rank(self) -> int:
        return self.a_PLRK.shape[2]

    def outputs_from(self, first: int) -> SiteStack:
        """The stack of the outputs [first, N), over the same memory."""
        part = bisect.bisect_right(self.bounds, first)
        bounds = tuple(bound - first for bound in self.bounds[part:])
        return replace(self, a_PLRK=self.a_PLRK[part:], b_NLR=self.b_NLR[first:], bounds=bounds)

    def part_of_outputs(self) -> Tensor:
        """[N], the part of each."""
        n = torch.arange(len(self.b_NLR), device=self.b_NLR.device)
        if self.is_interleaved:
            return n % self.num_parts
        return torch.bucketize(n, torch.tensor(self.bounds, device=n.device, dtype=n.dtype), right=True)


def add_updates(x_TK: Tensor, places_T: Tensor, stack: SiteStack, out_TN: Tensor) -> None:
    """out[t] += B A x[t] of the adapter at places[t]; -1: nothing. A x is rounded to the type of x, the sum once."""
    part_N = stack.part_of_outputs()
    for place in range(len(stack.ranks_L)):
        rows = torch.nonzero(places_T == place).flatten()
        rank = int(stack.ranks_L[place])
        if not len(rows) or not rank:
            continue
        a_PRK, b_NR = stack.a_PLRK[:, place, :rank].float(), stack.b_NLR[:, place, :rank].float()
        low_TPR = torch.einsum("tk,prk->tpr", x_TK[rows].float(), a_PRK).to(x_TK.dtype).float()
        update_TN = torch.einsum("tnr,nr->tn", low_TPR[:, part_N], b_NR)
        out_TN[rows] = (out_TN[rows].float() + update_TN).to(out_TN.dtype)
