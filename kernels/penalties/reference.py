"""Repetition, presence and frequency penalties by counts of tokens that stay on the device, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# R rows of logits, N of them penalised, C rows of counts, V vocabulary

PROMPT: Final = 1
"""A count is twice the number of times that a token is in the output, plus this if it is in the prompt."""
MOST: Final = 32766


@dataclass(frozen=True, slots=True)
class PenalisedRows:
    """Rows of a batch and their penalties, on the device.

    Args:
        rows_N: int32; the rows of logits.
        counts_N: int32; the rows of counts.
        repetition_N: float32; 1: off.
        presence_N: float32; 0: off.
        frequency_N: float32; 0: off.
    """

    rows_N: Tensor
    counts_N: Tensor
    repetition_N: Tensor
    presence_N: Tensor
    frequency_N: Tensor


def penalise(logits_RV: Tensor, counts_CV: Tensor, rows: PenalisedRows) -> None:
    """Change the logits of tokens that are in prompt or output, in place. None becomes plus infinity.

    Args:
        counts_CV: int16.
    """
    rows_N, counts_NV = rows.rows_N.long(), counts_CV[rows.counts_N.long()]
    old_NV = logits_RV[rows_N].float()
    repetition_N1 = rows.repetition_N.unsqueeze(1)
    new_NV = torch.where(old_NV > 0, old_NV / repetition_N1, old_NV * repetition_N1)
    output_NV = (counts_NV >> 1).float()
    new_NV = new_NV - rows.presence_N.unsqueeze(1) * (output_NV > 0) - rows.frequency_N.unsqueeze(1) * output_NV
    new_NV = torch.where(counts_NV > 0, new_NV.clamp_max_(torch.finfo(logits_RV.dtype).max), old_NV)
    logits_RV[rows_N] = new_NV.to(logits_RV.dtype)


def count(tokens_R: Tensor, counts_CV: Tensor, rows: PenalisedRows) -> None:
    """Count the tokens that the rows have drawn; of a row without a token, any."""
    tokens_N, places_N = tokens_R[rows.rows_N.long()].clamp_min(0), rows.counts_N.long()
    counts_CV[places_N, tokens_N] = (counts_CV[places_N, tokens_N].int() + 2).clamp_max_(MOST).short()
