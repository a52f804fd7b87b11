"""`LowRankUpdate`: what adapters add to a product of few rows, as the product's own kernel adds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from tensorweave.kernels.lora.stack import SiteStack

MAX_COLUMNS: Final = 32 * 512
"""Of the B of all places beside each other."""

# M rows, P parts of the outputs, L places, R most rank, N outputs


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """The product adds B low[m] to its outputs, with the B of the adapter at places[m], before all that follows it.

    Args:
        low_MPR: A x of each row and part, in the type of x: see `kernels.lora.cuda_shrink`. Rows at place -1 are not
            read.
        places_M: int32.
        reads_early: the kernel before is the one that makes `low`, and what came before that is complete when this one
            starts: it reads x before it waits.
    """

    low_MPR: Tensor
    places_M: Tensor
    stack: SiteStack
    reads_early: bool = False

    @property
    def part_starts(self) -> tuple[int, int]:
        """Where the second and third part of the outputs begin; N: there is none."""
        first, second = (*self.stack.bounds, *[len(self.stack.b_NLR)] * 2)[:2]
        return first, second

    def check(self, num_rows: int, num_outputs: int, *, is_gated: bool) -> None:
        N, _, R = self.stack.b_NLR.shape
        assert num_outputs == N
        assert self.places_M.shape == (num_rows,)
        assert self.low_MPR.shape == (num_rows, self.stack.num_parts, R)
        assert is_gated == self.stack.is_interleaved
        for tensor in (self.low_MPR, self.places_M, self.stack.b_NLR):
            assert tensor.is_contiguous()


def can_update(stack: SiteStack) -> bool:
    """Whether kernels for Hopper add what adapters at these places add."""
    L, R = len(stack.ranks_L), stack.max_rank
    fits_few = R <= 512 and 512 % R == 0 and R % 16 == 0 and L * R <= MAX_COLUMNS
    return fits_few and stack.a_PLRK.shape[3] % 64 == 0 and outputs_fit(stack, 64) and stack.num_parts <= 3


def outputs_fit(stack: SiteStack, block_n: int) -> bool:
    """Whether no block of so many outputs, which begin at multiples of it, is in two parts."""
    return stack.is_interleaved or all(bound % block_n == 0 for bound in stack.bounds)
