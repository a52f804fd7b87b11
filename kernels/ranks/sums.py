"""`RankSums`: the sum over a gang's ranks after each product that reads one rank's share, with what follows it.

Called twice a layer by `workers.models.device.split`. Forms: `reference` (over any gather) and `cuda_ranks` (one
kernel, for the GPUs of one host).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# T tokens, D hidden size


class RankSums(Protocol):
    """Every rank makes the same calls, with the same numbers of rows."""

    def empty(self, num_rows: int) -> Tensor:
        """Memory for rows [num_rows, D] of the model's type. All that `add_norm` is given comes from here, or is the
        first rows of such a tensor."""
        ...

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
        """x += the sum of all ranks' parts, in rank order and in float32; out = x / rms(x) * gain. Every rank gets the
        same bits. The part may be overwritten.

        Args:
            is_first: x is the sum alone.
            is_whole: False: x need be right in this rank's share of the rows only, which the next call reads; it must
                have as many rows then.
        """
        ...


def share_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows that a rank sums: as many as all others but the last ones."""
    share = -(-num_rows // num_ranks)
    return slice(min(rank * share, num_rows), min(rank * share + share, num_rows))
