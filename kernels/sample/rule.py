"""The rule by which tokens are drawn, the same in every form; and what the forms are given.

Gumbel-max (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030): a row's token is that of the largest logit +
temperature * g, where g is a Gumbel number from hash(seed, position, token). No sum over the vocabulary, and nothing
that depends on the batch. Of equal scores the first counts.

Thresholds are exact on integers: with z = (largest - logit) / temperature, a token's key is floor(z * 2¹⁷), at most
2²² - 1, and its mass round(exp(-z) * 2²⁶).

    min-p   keeps keys up to that of the probability min_p times the largest
    top-k   of those, keeps keys up to that of the k-th token; tokens of equal key stay together
    top-p   of those, keeps the keys before which less than top_p of the mass lies
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# R rows of logits, S sequence slots

LEAST_TEMPERATURE: Final = 1e-6
GREATEST_TEMPERATURE: Final = 1e20
KEYS_PER_UNIT: Final = 1 << 17
MASS_OF_LARGEST: Final = 1 << 26
LAST_KEY: Final = (1 << 22) - 1
LARGEST_W: Final = 1 - 2**-24
"""Of w, the uniform number of a token, so that log(1 - w) is a number."""


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """A number per row, on the logits' device; all contiguous.

    Args:
        temperature_R: float32; 0: the row is greedy, else from LEAST_TEMPERATURE to GREATEST_TEMPERATURE.
        top_k_R: int32; 0: off. Where it is 1, the row should be greedy.
        top_p_R: float32; 1: off.
        min_p_R: float32; 0: off.
        seed_R: int64.
        position_R: int32; the place in its sequence of the token that is drawn.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor


@dataclass(frozen=True, slots=True)
class TokenTarget:
    """Where the tokens go.

    Args:
        tokens_R: a token per row; NO_PLACE or NOTHING_LEFT (`kernels.argmax.reference`) where there is none. Any signed
            integers.
        slots_R: int32, with `newest_S`: the sequence slot of each row.
        newest_S: int32; the newest token of each slot, where a row without a token leaves 0.
    """

    tokens_R: Tensor
    slots_R: Tensor | None = None
    newest_S: Tensor | None = None

    @classmethod
    def create(cls, num_rows: int, device: torch.device) -> TokenTarget:
        return cls(torch.empty(num_rows, dtype=torch.int64, device=device))

    def leave_newest(self) -> None:
        """Copy `tokens_R` to its slots, for forms that do not do it themselves."""
        if self.slots_R is not None and self.newest_S is not None:
            self.newest_S[self.slots_R.long()] = self.tokens_R.clamp_min(0).to(self.newest_S.dtype)
