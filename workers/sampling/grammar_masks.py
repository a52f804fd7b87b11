"""`GrammarMasks`: rows of logits that follow grammars lose all tokens but those that may come next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tensorweave.kernels.token_mask.chosen import choose_mask_tokens
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.step.grammar import MaskFiller, Matcher

# R rows of logits, V vocabulary, N of the rows follow a grammar, W = ⌈V / 32⌉ words of a row of bits


class GrammarMasks:
    """Keeps from step to step what stays the same: memory, which would be mapped anew for each step, and the rows."""

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        self._mask_tokens = choose_mask_tokens(copies.device)
        self._memory = torch.empty(0, dtype=torch.int32)
        self._rows: list[int] = []
        self._rows_N = torch.empty(0, dtype=torch.int32)

    def apply(
        self, filler: MaskFiller, rows: list[int], matchers: Sequence[Matcher], logits_RV: Tensor
    ) -> dict[int, str]:
        """Change these rows in place. Return why a matcher has failed, by its place among them: such a row is of no
        use."""
        if rows != self._rows:
            self._rows, self._rows_N = rows, self._copies.to_device(np.array(rows, dtype=np.int32))
        num_words = (logits_RV.shape[1] + 31) // 32
        if self._memory.numel() < len(rows) * num_words:
            self._memory = torch.empty(len(rows) * num_words, dtype=torch.int32)
        masks_NW = self._memory[: len(rows) * num_words].view(len(rows), num_words)
        problems = filler.fill(matchers, masks_NW)
        self._mask_tokens(logits_RV, self._copies.to_device(masks_NW), self._rows_N)
        return problems
