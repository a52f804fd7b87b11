"""`Vocabulary`: which logits of a step a rank has, and how tokens are chosen from them.

Where the output head is split, a rank computes the logits of its own tokens. A batch of greedy rows, and of rows with a
temperature alone, needs no others: each rank finds its best score, and scores and tokens travel. Everything else that
looks at logits (limits, penalties, biases, grammars, users' processors, log-probabilities) is given those of all ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.ranks.reference import GatherColumns
from tensorweave.kernels.sample.chosen import Sampler

# R rows of logits, V vocabulary; S tokens of this rank


class Vocabulary(Protocol):
    @property
    def sampler(self) -> Sampler | None:
        """Chooses among the tokens of all ranks, given each rank's own logits; not with limits. None: logits must be
        gathered, or nothing is split."""
        ...

    def whole(self, logits_RS: Tensor) -> Tensor:
        """The logits of all tokens [R, V], in a buffer that the next call overwrites. Every rank calls it."""
        ...

    def gather(self, logits_RS: Tensor) -> Tensor:
        """The same in memory of its own, of any number of rows."""
        ...


class WholeVocabulary:
    """Nothing is split."""

    @property
    def sampler(self) -> None:
        return None

    def whole(self, logits_RS: Tensor) -> Tensor:
        return logits_RS

    def gather(self, logits_RS: Tensor) -> Tensor:
        return logits_RS


class SplitVocabulary:
    """`sizes` are the numbers of tokens of all ranks."""

    def __init__(
        self,
        sampler: Sampler | None,
        gather_columns: GatherColumns,
        sizes: tuple[int, ...],
        max_rows: int,
        device: torch.device,
    ) -> None:
        self._sampler = sampler
        self._gather_columns = gather_columns
        self._sizes = sizes
        self._whole_RV = torch.zeros(max_rows, sum(sizes), dtype=torch.float32, device=device)

    @property
    def sampler(self) -> Sampler | None:
        return self._sampler

    def whole(self, logits_RS: Tensor) -> Tensor:
        return self._whole_RV[: len(logits_RS)].copy_(self.gather(logits_RS))

    def gather(self, logits_RS: Tensor) -> Tensor:
        return self._gather_columns(logits_RS, self._sizes)
