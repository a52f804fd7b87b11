"""`LogitEdits`: what the sampling rules of many requests ask of their rows of logits, applied to all rows together.

A rule asks row by row, and each kind of edit is one indexed operation on the whole batch. Order: biases, bans,
repetition penalty, presence and frequency penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensorweave.cluster.protocol import SamplingSpec

# R rows of logits, V vocabulary

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]


class LogitEdits:
    """`top_p` holds, by row, what replaces the top_p of the row's request."""

    def __init__(self) -> None:
        self.top_p: dict[int, float] = {}
        self._biases: list[tuple[int, Ints, Floats]] = []
        self._full_biases: list[tuple[int, Tensor]] = []
        self._bans: list[tuple[int, Ints]] = []
        self._penalties: list[tuple[int, Ints, Floats, SamplingSpec]] = []

    def add(self, row: int, ids: Ints, values: Floats) -> None:
        """Add `values` to the logits of these tokens."""
        self._biases.append((row, ids, values))

    def add_to_all(self, row: int, bias_V: Tensor) -> None:
        """Add a number to the logit of every token."""
        self._full_biases.append((row, bias_V))

    def ban(self, row: int, ids: Sequence[int]) -> None:
        """These tokens must not come next."""
        if ids:
            self._bans.append((row, np.array(ids, dtype=np.int64)))

    def penalise(self, row: int, ids: Ints, counts: Floats, spec: SamplingSpec) -> None:
        """Apply the penalties of `spec` to these distinct tokens; `counts` says how often each is in the output. Both
        are copied, because a state may advance before the edits are applied."""
        if len(ids):
            self._penalties.append((row, ids.copy(), counts.copy(), spec))

    def apply(self, logits_RV: Tensor) -> None:
        """Change the logits in place."""
        if self._biases:
            values = torch.from_numpy(np.concatenate([values for _, _, values in self._biases])).to(logits_RV.device)
            index = _index([(row, ids) for row, ids, _ in self._biases], logits_RV)
            logits_RV.index_put_(index, values, accumulate=True)
        for row, bias_V in self._full_biases:
            logits_RV[row] += bias_V.to(logits_RV.device)
        if self._bans:
            logits_RV[_index(self._bans, logits_RV)] = -torch.inf
        if self._penalties:
            self._apply_penalties(logits_RV)

    def _apply_penalties(self, logits_RV: Tensor) -> None:
        lengths = [len(ids) for _, ids, _, _ in self._penalties]
        specs = [spec for *_, spec in self._penalties]

        def spread(numbers: Sequence[float]) -> Tensor:
            return torch.from_numpy(np.repeat(np.array(numbers, dtype=np.float32), lengths)).to(logits_RV.device)

        repetition = spread([spec.repetition_penalty for spec in specs])
        presence = spread([spec.presence_penalty for spec in specs])
        frequency = spread([spec.frequency_penalty for spec in specs])
        counts = torch.from_numpy(np.concatenate([counts for _, _, counts, _ in self._penalties])).to(logits_RV.device)
        index = _index([(row, ids) for row, ids, _, _ in self._penalties], logits_RV)
        old = logits_RV[index]
        new = torch.where(old > 0, old / repetition, old * repetition)
        logits_RV[index] = new - presence * (counts > 0) - frequency * counts


def _index(tokens: Sequence[tuple[int, Ints]], logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """An index of (row, token ids) pairs into the logits."""
    rows = np.repeat([row for row, _ in tokens], [len(ids) for _, ids in tokens])
    columns = np.concatenate([ids for _, ids in tokens])
    return torch.from_numpy(rows).to(logits_RV.device), torch.from_numpy(columns).to(logits_RV.device)
