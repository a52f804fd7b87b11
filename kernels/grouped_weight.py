"""`GroupedWeight`: a matrix of 4-bit or 8-bit integers with a scale for each group of inputs.

Made by `quantize_grouped` while a model is loaded, or exactly from checkpoints that come quantized this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

# N outputs, K inputs, G groups of inputs, S inputs of a group

ZERO_OF_8_BITS: Final = 128
_ROW_BLOCKS: Final = (64, 32, 16)
_TINY: Final = 1e-30  # below it a block counts as zeros


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """weight = scales * (code - zero) + minimums, computed in float32.

    Group g of an output has its inputs [g * group_size, (g + 1) * group_size); the last may be shorter. A group of
    `group_size` >= K is the whole row.

    `codes` are unsigned: uint8 [N, K] of 8 bits, whose `zero` is always 128, or [N, ceil(K / 2)] of two 4-bit codes
    each, the input of even number in the lower bits. `scales_NG` and `minimums_NG` (None: no minimums) are float32,
    float16 or bfloat16. `dtype` is that of the rows it multiplies. Rows are quantized to integers of `row_bits` on
    the way (`round_rows`).
    """

    codes: Tensor
    scales_NG: Tensor
    minimums_NG: Tensor | None
    num_inputs: int
    group_size: int
    bits: Literal[4, 8]
    zero: int
    dtype: torch.dtype
    row_bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        N, K, G = self.num_outputs, self.num_inputs, -(-self.num_inputs // self.group_size)
        assert self.codes.dtype == torch.uint8
        assert self.codes.shape == (N, K if self.bits == 8 else -(-K // 2)), self.codes.shape
        assert self.scales_NG.shape == (N, G), self.scales_NG.shape
        assert self.minimums_NG is None or self.minimums_NG.shape == (N, G)
        assert self.zero == ZERO_OF_8_BITS if self.bits == 8 else 0 <= self.zero < 16

    @classmethod
    def of_codes(
        cls,
        codes_NK: Tensor,
        scales_NG: Tensor,
        minimums_NG: Tensor | None = None,
        *,
        group_size: int,
        bits: Literal[4, 8],
        zero: int,
        dtype: torch.dtype,
        row_bits: Literal[8, 16] = 16,
    ) -> Self:
        """Make a weight of one code per byte, also for 4 bits."""
        K = codes_NK.shape[1]
        codes = codes_NK if bits == 8 else pack_nibbles(codes_NK)
        return cls(codes, scales_NG, minimums_NG, K, min(group_size, K), bits, zero, dtype, row_bits)

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def num_groups(self) -> int:
        return self.scales_NG.shape[1]

    def codes_NK(self) -> Tensor:
        """uint8, one per byte."""
        return self.codes if self.bits == 8 else unpack_nibbles(self.codes, self.num_inputs)

    def wide_rows(self) -> Tensor:
        """[N, K] in float32."""
        steps_NK = self.codes_NK().float() - self.zero
        wide_NK = steps_NK.mul_(self._spread(self.scales_NG))
        return wide_NK if self.minimums_NG is None else wide_NK.add_(self._spread(self.minimums_NG))

    def rows(self) -> Tensor:
        """[N, K] in `dtype`."""
        return self.wide_rows().to(self.dtype)

    def outputs(self, rows: range) -> GroupedWeight:
        """Some outputs alone, over the same memory."""
        part = slice(rows.start, rows.stop)
        minimums_NG = None if self.minimums_NG is None else self.minimums_NG[part]
        return replace(self, codes=self.codes[part], scales_NG=self.scales_NG[part], minimums_NG=minimums_NG)

    def reordered(self, order_N: Tensor) -> GroupedWeight:
        """Its outputs in another order: output i is output order[i] of these."""
        minimums_NG = None if self.minimums_NG is None else self.minimums_NG[order_N]
        return replace(self, codes=self.codes[order_N], scales_NG=self.scales_NG[order_N], minimums_NG=minimums_NG)

    def inputs(self, columns: range) -> GroupedWeight:
        """Some inputs alone. Groups become smaller where `columns` begin within one."""
        has_one_group = self.group_size >= self.num_inputs
        size = self.group_size if has_one_group else math.gcd(self.group_size, columns.start)
        fine = self.regrouped(size)
        codes_NK = fine.codes_NK()[:, columns.start : columns.stop].contiguous()
        groups = slice(0, 1) if has_one_group else slice(columns.start // size, -(-columns.stop // size))
        return replace(
            fine,
            codes=codes_NK if self.bits == 8 else pack_nibbles(codes_NK),
            scales_NG=fine.scales_NG[:, groups],
            minimums_NG=None if fine.minimums_NG is None else fine.minimums_NG[:, groups],
            num_inputs=len(columns),
            group_size=min(size, len(columns)),
        )

    def regrouped(self, size: int) -> GroupedWeight:
        """The same weights in groups of `size`, a divisor of `group_size` (or any, if a group is the whole row)."""
        if size == self.group_size:
            return self
        assert self.group_size >= self.num_inputs or self.group_size % size == 0, (self.group_size, size)
        first_G = torch.arange(0, self.num_inputs, size, device=self.codes.device) // self.group_size
        minimums_NG = None if self.minimums_NG is None else self.minimums_NG[:, first_G]
        return replace(self, scales_NG=self.scales_NG[:, first_G], minimums_NG=minimums_NG, group_size=size)

    def in_8_bits(self) -> GroupedWeight:
        """The same weights, in twice the memory if these are of 4 bits."""
        if self.bits == 8:
            return self
        codes_NK = self.codes_NK() + (ZERO_OF_8_BITS - self.zero)
        return replace(self, codes=codes_NK, bits=8, zero=ZERO_OF_8_BITS)

    def _spread(self, numbers_NG: Tensor) -> Tensor:
        """[N, K] float32, or [N, 1] of a single group."""
        if self.num_groups == 1:
            return numbers_NG.float()
        return numbers_NG.float().repeat_interleave(self.group_size, dim=1)[:, : self.num_inputs]


def round_rows(x_MK: Tensor, row_bits: Literal[8, 16], block: int) -> Tensor:
    """Rows in float32 as products with a `GroupedWeight` see them: in every `block` inputs of a row, multiples of the
    largest magnitude divided by 127, or by 127 * 256."""
    whole = 127 if row_bits == 8 else 127 * 256
    M, K = x_MK.shape
    blocks_MGS = F.pad(x_MK.float(), (0, -K % block)).view(M, -1, block)
    largest_MG1 = blocks_MGS.abs().amax(2, keepdim=True)
    # A number divided by a tensor would be a product with rounded reciprocals.
    inverse_MG1 = torch.where(largest_MG1 < _TINY, 0, torch.full_like(largest_MG1, whole) / largest_MG1)
    numbers_MGS = (
        (blocks_MGS.double() * inverse_MG1).round().float()
    )  # of the exact product, as a fused multiply-add has it
    return (numbers_MGS * (largest_MG1 / whole)).view(M, -1)[:, :K]


def row_block(weight: GroupedWeight) -> int | None:
    """Inputs of a row that are rounded together: the most of 64, 32 and 16 that divides the groups, if one does."""
    has_one_group = weight.group_size >= weight.num_inputs
    return next((each for each in _ROW_BLOCKS if has_one_group or weight.group_size % each == 0), None)


def stack_grouped(parts: Sequence[GroupedWeight]) -> GroupedWeight:
    """One below the other, exactly: in 8 bits where the parts' bits or zeros differ, in groups of the greatest common
    divisor of their sizes."""
    if len({(part.bits, part.zero) for part in parts}) > 1:
        parts = [part.in_8_bits() for part in parts]
    first, K = parts[0], parts[0].num_inputs
    sizes = {part.group_size for part in parts}
    size = sizes.pop() if len(sizes) == 1 else math.gcd(*(size for size in sizes if size < K))
    parts = [part.regrouped(size) for part in parts]
    has_minimums = any(part.minimums_NG is not None for part in parts)
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales_NG=_joined([part.scales_NG for part in parts]),
        minimums_NG=_joined([_minimums(part) for part in parts]) if has_minimums else None,
        group_size=size,
        dtype=first.dtype,
    )


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """Two codes below 16 a byte, [N, ceil(K / 2)]: the first in the lower bits."""
    num_inputs = codes_NK.shape[1]
    low, high = codes_NK[:, 0::2], codes_NK[:, 1::2]
    packed = low.clone()
    packed[:, : num_inputs // 2] |= high << 4
    return packed


def unpack_nibbles(packed: Tensor, num_inputs: int) -> Tensor:
    """[N, K] uint8, one code a byte."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :num_inputs]


def _minimums(part: GroupedWeight) -> Tensor:
    return torch.zeros_like(part.scales_NG) if part.minimums_NG is None else part.minimums_NG


def _joined(parts: Sequence[Tensor]) -> Tensor:
    dtypes = {part.dtype for part in parts}
    return torch.cat([part if len(dtypes) == 1 else part.float() for part in parts])
