"""What the ranks of a gang exchange in a step, in torch over any gather: what the kernel is tested against, and the
form for ranks on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from tensorweave.kernels.argmax.reference import NO_PLACE, NOTHING_LEFT
from tensorweave.kernels.norm.reference import rms_norm
from tensorweave.kernels.ranks.sums import share_of
from tensorweave.kernels.sample.reference import scores
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget

# T tokens, D hidden size, R rows of logits, V vocabulary of this rank, W ranks

_POISON: Final = float("nan")


class GatherColumns(Protocol):
    """[R, sum(sizes)]: each rank's [R, sizes[rank]] side by side, on every rank."""

    def __call__(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor: ...


class ReferenceSums:
    """Satisfies `RankSums`. Rows of x that need not be right are left as NaN, so that reading them shows."""

    def __init__(
        self, gather: GatherColumns, rank: int, num_ranks: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._gather = gather
        self._rank = rank
        self._num_ranks = num_ranks
        self._width = width
        self._dtype = dtype
        self._device = device

    def empty(self, num_rows: int) -> Tensor:
        return torch.zeros(num_rows, self._width, dtype=self._dtype, device=self._device)

    def add_norm(
        self,
        part_TD: Tensor,
        x_TD: Tensor,
        gain_D: Tensor,
        epsilon: float,
        out_TD: Tensor,
        *,
        is_first: bool = False,
        is_whole: bool = True,
    ) -> None:
        shares = [share_of(len(part_TD), rank, self._num_ranks) for rank in range(self._num_ranks)]
        first_TD, *other_parts = self._of_ranks(part_TD)
        sum_TD = first_TD.float()
        for other_TD in other_parts:
            sum_TD = sum_TD + other_TD.float()
        new_TD = (sum_TD if is_first else x_TD.float() + sum_TD).to(self._dtype)
        each = zip(shares, self._of_ranks(new_TD), strict=True)
        x_TD.copy_(torch.cat([of_rank_TD[share] for share, of_rank_TD in each]))
        out_TD.copy_(rms_norm(x_TD, gain_D, epsilon))
        if not is_whole:
            x_TD[: shares[self._rank].start] = _POISON
            x_TD[shares[self._rank].stop :] = _POISON

    def _of_ranks(self, rows_TD: Tensor) -> Sequence[Tensor]:
        return torch.split(self._gather(rows_TD, [self._width] * self._num_ranks), self._width, dim=1)


class ReferenceChoice:
    """Satisfies `kernels.sample.chosen.Sampler` for rows without limits, each rank being given the logits of its part
    of the vocabulary, which begins at token `first`."""

    def __init__(self, gather: GatherColumns, num_ranks: int, first: int) -> None:
        self._gather = gather
        self._num_ranks = num_ranks
        self._first = first

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        logits_RV = logits_RV.float()
        self._choose(logits_RV.masked_fill(logits_RV.isnan(), torch.inf), target)

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        assert not has_limits, "limits need all of a row's logits"
        self._choose(scores(logits_RV, parameters, self._first), target)

    def _choose(self, score_RV: Tensor, target: TokenTarget) -> None:
        best_R, place_R = score_RV.max(dim=-1)
        mine_R2 = torch.stack([best_R.double(), (place_R + self._first).double()], dim=1)
        pairs_RW2 = self._gather(mine_R2, [2] * self._num_ranks).view(len(mine_R2), -1, 2)
        best_R1, rank_R1 = pairs_RW2[:, :, 0].max(dim=1, keepdim=True)
        best_R, tokens_R = best_R1.squeeze(1), pairs_RW2[:, :, 1].gather(1, rank_R1).squeeze(1).long()
        tokens_R.masked_fill_(best_R == torch.inf, NO_PLACE).masked_fill_(best_R == -torch.inf, NOTHING_LEFT)
        target.tokens_R.copy_(tokens_R)
        target.leave_newest()
