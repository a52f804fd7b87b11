"""`IntegerGroups`: codes, scales and zero points as most integer formats keep them, and the `Weight` they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from tensorweave.kernels.weights import GroupedWeight, ReorderedWeight, Weight
from tensorweave.workers.models.quantized.matrix_format import MatrixPart

# N outputs, K inputs, G groups of inputs

_ZEROS: Final[dict[int, tuple[Literal[4, 8], int]]] = {2: (4, 2), 4: (4, 8), 8: (8, 128)}
"""By the bits of a format: the bits in which codes are kept, and the zero of all groups."""
_LEAST_GROUP, _MOST_GROUP = 16, 128


@dataclass(frozen=True, slots=True)
class IntegerGroups:
    """weight = scales * (code - zero), exact in float32 for scales of 16 bits.

    `codes_NK` are unsigned bytes, one a code, of some outputs and all inputs; scales keep their type. `zeros_NG` are
    the groups' own zeros (None: the middle of the codes). `groups_K` is the group of each input where these are not in
    succession.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    group_size: int
    bits: int
    groups_K: Tensor | None = None

    def weight(self, part: MatrixPart) -> Weight:
        """The weight of the part's columns alone."""
        K = self.codes_NK.shape[1]
        if self.groups_K is not None and not torch.equal(self.groups_K, torch.arange(K) // self.group_size):
            return self._reordered(self.groups_K, part)
        whole = self._grouped(self.codes_NK, self.scales_NG, self._minimums(), self.group_size, part.dtype)
        return whole if part.is_whole_rows else whole.inputs(part.columns)

    def _reordered(self, groups_K: Tensor, part: MatrixPart) -> ReorderedWeight:
        """Sorted by groups. Where a rank's columns cut them into unequal ones, each is filled up to a multiple of 16:
        inputs beyond the last are 0."""
        num_kept = len(part.columns)
        groups = groups_K[part.column_slice]
        order = torch.argsort(groups, stable=True)
        present, counts = torch.unique(groups, return_counts=True)
        size = max(_LEAST_GROUP, math.gcd(_MOST_GROUP, *counts.tolist()))
        pieces, sizes = [], []
        for run in torch.split(order, counts.tolist()):
            padding = -len(run) % size
            pieces.append(torch.cat([run, run.new_full((padding,), num_kept)]))
            sizes.append((len(run) + padding) // size)
        order_P = torch.cat(pieces)
        codes_NK = self.codes_NK[:, part.column_slice]
        codes_NP = codes_NK[:, order_P.clamp_max(num_kept - 1)]
        groups_of_P = present.repeat_interleave(torch.tensor(sizes))
        minimums_NG = self._minimums()
        inner = self._grouped(
            codes_NP,
            self.scales_NG[:, groups_of_P],
            None if minimums_NG is None else minimums_NG[:, groups_of_P],
            size,
            part.dtype,
        )
        return ReorderedWeight(inner, order_P, num_kept)

    def _minimums(self) -> Tensor | None:
        zero = _ZEROS[self.bits][1]
        if self.zeros_NG is None or bool((self.zeros_NG == zero).all()):
            return None
        return self.scales_NG.float() * (zero - self.zeros_NG.float())

    def _grouped(
        self, codes_NK: Tensor, scales_NG: Tensor, minimums_NG: Tensor | None, size: int, dtype: torch.dtype
    ) -> GroupedWeight:
        bits, zero = _ZEROS[self.bits]
        return GroupedWeight.of_codes(
            codes_NK.contiguous(), scales_NG, minimums_NG, group_size=size, bits=bits, zero=zero, dtype=dtype
        )
