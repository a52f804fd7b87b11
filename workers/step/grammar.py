"""What the sampling knows of a compiled grammar: `Grammar`, and a `Matcher` for each sequence. `workers.guided` has
them.

The state of a matcher is a function of the tokens that it has accepted, so a matcher that accepts the output of another
one continues for it: after a pause, on another gang, or in another phase of a disaggregated request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

# N rows of the batch that follow a grammar, W = ⌈vocabulary / 32⌉ words of a row of bits


class Matcher(Protocol):
    """Follows one sequence's output. `filler` fills its rows of bits."""

    @property
    def filler(self) -> MaskFiller: ...

    def accept(self, tokens: Sequence[int]) -> bool:
        """Take in the next tokens of the output. False if the grammar does not allow them: the matcher is then of no
        more use."""

    def roll_back(self, num_tokens: int) -> None:
        """Take back the newest tokens."""


class MaskFiller(Protocol):
    """Shared by the matchers of one library, so that it fills all their rows in one call."""

    def fill(self, matchers: Sequence[Matcher], masks_NW: Tensor) -> dict[int, str]:
        """Set bit t of row n if matcher n allows token t next: text within the grammar, or a stop token at its end.

        Args:
            masks_NW: int32 on the host.

        Returns:
            Why a matcher has failed, by row. The bits of such a row are of no use.
        """


class Grammar(Protocol):
    """A grammar, compiled for the model's vocabulary. May be used by several threads.

    With a `problem` no output follows it any further: all ranks have agreed on that.
    """

    problem: str

    def report_slow(self) -> None:
        """Tell rank 0 that tokens of an output took too long to accept; it decides what becomes of the grammar."""

    def matcher(self, stop_token_ids: Sequence[int]) -> Matcher:
        """A matcher before the first token. These tokens are allowed at the grammar's end and nowhere else."""
