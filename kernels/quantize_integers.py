"""Matrices to a `GroupedWeight`: `quantize_integers`, called while a model is loaded."""

from __future__ import annotations

from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.grouped_weight import ZERO_OF_8_BITS, GroupedWeight

# N outputs, K inputs, G groups of inputs, S inputs of a group

_ZERO_OF_4_BITS: Final = 8
_TRIALS: Final = (-7.0, -7.4, -7.7, -8.0, -8.3, -8.6, -9.0, -9.5, -10.0)
"""What the number of largest magnitude of a group of 4 bits is tried to become, before it is rounded to -8 to 7."""
_AT_ONCE: Final = 1 << 18  # elements: in float32 they stay in a level-2 cache


def quantize_integers(
    weight_NK: Tensor, *, bits: Literal[4, 8], group_size: int | None, row_bits: Literal[8, 16]
) -> GroupedWeight:
    """Of 8 bits, the largest magnitude of a group becomes 127. Of 4, the scale is that of the least squared error among
    a few trials, in which -8 is the largest magnitude's side. Scales are float16 where that has them to 2^-10.

    Args:
        group_size: None: the whole row.
    """
    N, K = weight_NK.shape
    size = K if group_size is None else min(group_size, K)
    codes_NK = torch.empty(N, K, dtype=torch.uint8, device=weight_NK.device)
    scales_NG = torch.empty(N, -(-K // size), dtype=torch.float32, device=weight_NK.device)
    step = max(1, _AT_ONCE // K)
    quantize = _quantize_8 if bits == 8 else _quantize_4
    for first in range(0, N, step):
        rows = slice(first, first + step)
        wide_NK = F.pad(weight_NK[rows].float(), (0, -K % size))
        groups_NGS = wide_NK.view(len(wide_NK), -1, size)
        codes_NGS, scales_NG[rows] = quantize(groups_NGS)
        codes_NK[rows] = codes_NGS.flatten(1)[:, :K].to(torch.uint8)
    return GroupedWeight.of_codes(
        codes_NK,
        scales_NG if bits == 8 else _in_half(scales_NG),
        group_size=size,
        bits=bits,
        zero=ZERO_OF_8_BITS if bits == 8 else _ZERO_OF_4_BITS,
        dtype=weight_NK.dtype,
        row_bits=row_bits,
    )


def _quantize_8(groups_NGS: Tensor) -> tuple[Tensor, Tensor]:
    scales_NG = groups_NGS.abs().amax(2) * (1 / 127)
    return _codes(groups_NGS, scales_NG, 127, ZERO_OF_8_BITS), scales_NG


def _quantize_4(groups_NGS: Tensor) -> tuple[Tensor, Tensor]:
    """For each trial, the best scale of its codes q is sum(w q) / sum(q q), and lowers the squared error by
    sum(w q)^2 / sum(q q)."""
    place_NG1 = groups_NGS.abs().argmax(2, keepdim=True)
    extreme_NG = groups_NGS.gather(2, place_NG1).squeeze(2)
    best_NG, scales_NG = torch.zeros_like(extreme_NG), torch.zeros_like(extreme_NG)
    for trial in _TRIALS:
        steps_NGS = _steps(groups_NGS, extreme_NG / trial, 7)
        dot_NG, square_NG = (groups_NGS * steps_NGS).sum(2), steps_NGS.square_().sum(2).clamp_min_(1)
        gain_NG = dot_NG * dot_NG / square_NG
        is_better_NG = gain_NG > best_NG
        best_NG = torch.where(is_better_NG, gain_NG, best_NG)
        scales_NG = torch.where(is_better_NG, dot_NG / square_NG, scales_NG)
    return _codes(groups_NGS, _in_half(scales_NG).float(), 7, _ZERO_OF_4_BITS), scales_NG


def _steps(groups_NGS: Tensor, scales_NG: Tensor, most: int) -> Tensor:
    """Whole numbers from -most - 1 to most."""
    inverse_NG = torch.where(scales_NG == 0, 0, scales_NG.reciprocal())
    return (groups_NGS * inverse_NG.unsqueeze(2)).round_().clamp_(-most - 1, most)


def _codes(groups_NGS: Tensor, scales_NG: Tensor, most: int, zero: int) -> Tensor:
    return _steps(groups_NGS, scales_NG, most) + zero


def _in_half(scales_NG: Tensor) -> Tensor:
    """As they are, if some of them would lose more than half precision's 11 bits."""
    half_NG = scales_NG.to(torch.float16)
    is_close = ((half_NG.float() - scales_NG).abs() <= scales_NG.abs() * 2**-10).all()
    return half_NG if is_close else scales_NG
