"""Matrices to a `GroupedWeight`: `quantize_integers`, called while a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self

import torch
from torch import Tensor

from tensorweave.kernels.grouped_weight import ZERO_OF_8_BITS, GroupedWeight
from tensorweave.kernels.native.library import NativeKernels, load_native

# N outputs, K inputs, G groups of inputs, S inputs of a group

_ZERO_OF_4_BITS: Final = 8
_TRIALS: Final = (-7.0, -7.4, -7.7, -8.0, -8.3, -8.6, -9.0, -9.5, -10.0)
"""What the number of largest magnitude of a group of 4 bits is tried to become, before it is rounded to -8 to 7."""
_SHRINKS: Final = (1.0, 0.96, 0.92, 0.88, 0.84)
"""The share of a group's range that sixteen codes are tried to span."""
_AT_ONCE: Final = 1 << 18  # elements: in float32 they stay in a level-2 cache
_AT_ONCE_ON_GPU: Final = 1 << 24  # fewer launches


def quantize_integers(
    weight_NK: Tensor,
    *,
    bits: Literal[4, 8],
    group_size: int | None,
    row_bits: Literal[8, 16],
    has_minimums: bool = False,
) -> GroupedWeight:
    """Of 8 bits, the largest magnitude of a group becomes 127. Of 4, scales (and minimums) are those of the least
    squared error among a few trials: without minimums -8 is on the side of the largest magnitude. They are in float16
    where that has them to 2^-10.

    Args:
        group_size: None: the whole row.
        has_minimums: of 4 bits alone.
    """
    N, K = weight_NK.shape
    size = K if group_size is None else min(group_size, K)
    native = load_native(weight_NK.dtype) if weight_NK.device.type == "cpu" else None
    if native is not None and not has_minimums:
        return _quantize_natively(native, weight_NK, bits, size, row_bits)
    parts = _Parts.empty(N, K, size, weight_NK.device)
    quantize = _quantize_range if has_minimums else _quantize_8 if bits == 8 else _quantize_4
    at_once = _AT_ONCE if weight_NK.device.type == "cpu" else _AT_ONCE_ON_GPU
    step, whole = max(1, at_once // K), K // size * size
    for first in range(0, N, step):
        rows = slice(first, first + step)
        wide_NK = weight_NK[rows].float()
        groups_NGS = wide_NK[:, :whole].unflatten(1, (-1, size))  # type: ignore[no-untyped-call]
        parts.put(rows, 0, quantize(groups_NGS))
        if whole < K:  # the last group is shorter
            parts.put(rows, whole, quantize(wide_NK[:, whole:].unsqueeze(1)))
    return GroupedWeight.of_codes(
        parts.codes_NK,
        parts.scales_NG if bits == 8 else _in_half(parts.scales_NG),
        _in_half(parts.minimums_NG) if has_minimums else None,
        group_size=size,
        bits=bits,
        zero=ZERO_OF_8_BITS if bits == 8 else 0 if has_minimums else _ZERO_OF_4_BITS,
        dtype=weight_NK.dtype,
        row_bits=row_bits,
    )


def _quantize_natively(
    native: NativeKernels, weight_NK: Tensor, bits: Literal[4, 8], size: int, row_bits: Literal[8, 16]
) -> GroupedWeight:
    """`kernels/c/quantize.h`, on all threads: 1 ns a weight of 4 bits and thread, where torch takes 25."""
    N, K = weight_NK.shape
    weight_NK = weight_NK.contiguous()
    scales_NG = torch.empty(N, -(-K // size))
    codes = torch.empty(N, K if bits == 8 else -(-K // 2), dtype=torch.uint8)
    native.choose_scales(weight_NK.data_ptr(), N, K, size, bits, scales_NG.data_ptr())
    kept_NG = scales_NG if bits == 8 else _in_half(scales_NG)
    read_NG = kept_NG.float()
    native.round_weights(weight_NK.data_ptr(), read_NG.data_ptr(), N, K, size, bits, codes.data_ptr())
    zero = ZERO_OF_8_BITS if bits == 8 else _ZERO_OF_4_BITS
    return GroupedWeight(codes, kept_NG, None, K, size, bits, zero, weight_NK.dtype, row_bits)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a `GroupedWeight`, filled some rows at a time."""

    codes_NK: Tensor
    scales_NG: Tensor
    minimums_NG: Tensor
    size: int

    @classmethod
    def empty(cls, N: int, K: int, size: int, device: torch.device) -> Self:
        numbers = torch.zeros(2, N, -(-K // size), device=device)
        return cls(torch.empty(N, K, dtype=torch.uint8, device=device), numbers[0], numbers[1], size)

    def put(self, rows: slice, first_input: int, made: tuple[Tensor, Tensor, Tensor | None]) -> None:
        codes_NGS, scales_NG, minimums_NG = made
        codes_NK, group = codes_NGS.flatten(1), first_input // self.size
        groups = slice(group, group + scales_NG.shape[1])
        self.codes_NK[rows, first_input : first_input + codes_NK.shape[1]] = codes_NK.to(torch.uint8)
        self.scales_NG[rows, groups] = scales_NG
        if minimums_NG is not None:
            self.minimums_NG[rows, groups] = minimums_NG


def _quantize_8(groups_NGS: Tensor) -> tuple[Tensor, Tensor, None]:
    scales_NG = groups_NGS.abs().amax(2) * (1 / 127)
    return _codes(groups_NGS, scales_NG, 127, ZERO_OF_8_BITS), scales_NG, None


def _quantize_4(groups_NGS: Tensor) -> tuple[Tensor, Tensor, None]:
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
    return _codes(groups_NGS, _in_half(scales_NG).float(), 7, _ZERO_OF_4_BITS), scales_NG, None


def _quantize_range(groups_NGS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each trial, scale and minimum are the line of least squares through codes and weights."""
    low_NG, high_NG = groups_NGS.amin(2), groups_NGS.amax(2)
    middle_NG, mean_NG = (low_NG + high_NG) / 2, groups_NGS.mean(2)
    least_NG = torch.full_like(low_NG, torch.inf)
    scales_NG, minimums_NG = torch.zeros_like(low_NG), low_NG.clone()
    for shrink in _SHRINKS:
        step_NG = (high_NG - low_NG) * (shrink / 15)
        codes_NGS = _codes_from(groups_NGS, step_NG, middle_NG - 7.5 * step_NG)
        mean_code_NG = codes_NGS.mean(2)
        offsets_NGS = codes_NGS - mean_code_NG.unsqueeze(2)
        spread_NG = offsets_NGS.square().sum(2).clamp_min_(1e-9)
        slope_NG = _in_half((groups_NGS * offsets_NGS).sum(2) / spread_NG).float()
        start_NG = _in_half(mean_NG - slope_NG * mean_code_NG).float()
        rounded_NGS = codes_NGS.mul_(slope_NG.unsqueeze(2)).add_(start_NG.unsqueeze(2))
        error_NG = rounded_NGS.sub_(groups_NGS).square_().sum(2)
        is_better_NG = error_NG < least_NG
        least_NG = torch.where(is_better_NG, error_NG, least_NG)
        scales_NG = torch.where(is_better_NG, slope_NG, scales_NG)
        minimums_NG = torch.where(is_better_NG, start_NG, minimums_NG)
    return _codes_from(groups_NGS, scales_NG, minimums_NG), scales_NG, minimums_NG


def _codes_from(groups_NGS: Tensor, scales_NG: Tensor, minimums_NG: Tensor) -> Tensor:
    inverse_NG = torch.where(scales_NG == 0, 0, scales_NG.reciprocal())
    return ((groups_NGS - minimums_NG.unsqueeze(2)) * inverse_NG.unsqueeze(2)).round_().clamp_(0, 15)


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
