"""`LogitEdits`: what the sampling rules of many requests ask of their rows of logits, applied to all rows together.

A rule asks row by row, and each kind of edit is one indexed operation on the whole batch. Order: biases, grammars,
bans, repetition penalty, presence and frequency penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensorweave.cluster.errors import RequestRejected, TensorweaveError
from tensorweave.cluster.guide import GUIDE_PARAM
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.sampling.grammar_masks import GrammarMasks
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.step.grammar import MaskFiller, Matcher

# R rows of logits, V vocabulary

_SMALL: Final = 1e30
"""Added to the largest number, a bias up to this is lost in rounding."""

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]


class LogitEdits:
    """`top_p` holds, by row, what replaces the top_p of the row's request, and `failures` why a row gives no token."""

    def __init__(self) -> None:
        self.top_p: dict[int, float] = {}
        self.failures: dict[int, TensorweaveError] = {}
        self._guided: dict[MaskFiller, list[tuple[int, Matcher]]] = {}
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

    def follow_grammar(self, row: int, matcher: Matcher) -> None:
        """The next token is one that the grammar allows."""
        self._guided.setdefault(matcher.filler, []).append((row, matcher))

    def ban(self, row: int, ids: Sequence[int]) -> None:
        """These tokens must not come next."""
        if ids:
            self._bans.append((row, np.array(ids, dtype=np.int64)))

    def penalise(self, row: int, ids: Ints, counts: Floats, spec: SamplingSpec) -> None:
        """Apply the penalties of `spec` to these distinct tokens; `counts` says how often each is in the output. Both
        are copied, because a state may advance before the edits are applied."""
        if len(ids):
            self._penalties.append((row, ids.copy(), counts.copy(), spec))

    def apply(self, logits_RV: Tensor, copies: HostCopies, masks: GrammarMasks) -> None:
        """Change the logits in place. No number becomes plus infinity, so that a token which is certain has a score."""
        if self._biases or self._full_biases:
            self._apply_biases(logits_RV, copies)
        for filler, guided in self._guided.items():
            self._apply_grammars(filler, guided, logits_RV, masks)
        if self._bans:
            logits_RV.view(-1).index_fill_(0, _index(self._bans, logits_RV.shape[1], copies), -torch.inf)
        if self._penalties:
            self._apply_penalties(logits_RV.view(-1), logits_RV.shape[1], copies)

    def _apply_biases(self, logits_RV: Tensor, copies: HostCopies) -> None:
        logits_N, V = logits_RV.view(-1), logits_RV.shape[1]
        greatest = torch.finfo(logits_RV.dtype).max
        if self._biases:
            values = np.concatenate([values for _, _, values in self._biases])
            index = _index([(row, ids) for row, ids, _ in self._biases], V, copies)
            logits_N.index_add_(0, index, copies.to_device(values).to(logits_RV.dtype))
            if np.abs(values).max() > _SMALL:
                logits_N.index_copy_(0, index, logits_N[index].clamp_max_(greatest))
        for row, bias_V in self._full_biases:
            logits_RV[row].add_(copies.to_device(bias_V)).clamp_max_(greatest)

    def _apply_grammars(
        self, filler: MaskFiller, guided: Sequence[tuple[int, Matcher]], logits_RV: Tensor, masks: GrammarMasks
    ) -> None:
        rows, matchers = [row for row, _ in guided], [matcher for _, matcher in guided]
        for place, problem in masks.apply(filler, rows, matchers, logits_RV).items():
            refusal = RequestRejected(f"the grammar cannot be followed further: {problem}", param=GUIDE_PARAM)
            self.failures[rows[place]] = refusal

    def _apply_penalties(self, logits_N: Tensor, vocab_size: int, copies: HostCopies) -> None:
        lengths = [len(ids) for _, ids, _, _ in self._penalties]
        specs = [spec for *_, spec in self._penalties]

        def spread(numbers: Sequence[float]) -> Tensor:
            return copies.to_device(np.repeat(np.array(numbers, dtype=np.float32), lengths))

        repetition = spread([spec.repetition_penalty for spec in specs])
        presence = spread([spec.presence_penalty for spec in specs])
        frequency = spread([spec.frequency_penalty for spec in specs])
        counts = copies.to_device(np.concatenate([counts for _, _, counts, _ in self._penalties]))
        index = _index([(row, ids) for row, ids, _, _ in self._penalties], vocab_size, copies)
        old = logits_N[index].float()
        new = torch.where(old > 0, old / repetition, old * repetition)
        new = (new - presence * (counts > 0) - frequency * counts).clamp_max_(torch.finfo(logits_N.dtype).max)
        logits_N.index_copy_(0, index, new.to(logits_N.dtype))


def _index(tokens: Sequence[tuple[int, Ints]], vocab_size: int, copies: HostCopies) -> Tensor:
    """The places of these token ids of these rows in the logits of all rows, one after the other."""
    return copies.to_device(np.concatenate([ids + row * vocab_size for row, ids in tokens]))
