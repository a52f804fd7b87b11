"""`GroupedFloatWeight`: a matrix of 8-bit or 4-bit floats with a scale for each group of inputs.

Made exactly from checkpoints in FP8 with blocks and in MXFP4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

import torch
from torch import Tensor

from tensorweave.kernels.grouped_weight import ZERO_OF_8_BITS, GroupedWeight, pack_nibbles, unpack_nibbles

# N outputs, K inputs, G groups of inputs

E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes without sign (OCP Microscaling Formats 1.0); bit 3 is the sign."""
FloatKind = Literal["e4m3", "e2m1"]


@dataclass(frozen=True, slots=True)
class GroupedFloatWeight:
    """weight = scales * value of the code, in float32.

    Group g of an output has its inputs [g * group_size, (g + 1) * group_size); the last may be shorter. `codes` are
    uint8: [N, K] of e4m3, or [N, ceil(K / 2)] of two e2m1 each, the input of even number in the lower bits.
    `scales_NG` are float32. `dtype` is that of the rows it multiplies.
    """

    codes: Tensor
    scales_NG: Tensor
    num_inputs: int
    group_size: int
    kind: FloatKind
    dtype: torch.dtype

    def __post_init__(self) -> None:
        N, K = self.num_outputs, self.num_inputs
        assert self.codes.dtype == torch.uint8
        assert self.codes.shape == (N, K if self.kind == "e4m3" else -(-K // 2)), self.codes.shape
        assert self.scales_NG.dtype == torch.float32
        assert self.scales_NG.shape == (N, -(-K // self.group_size)), self.scales_NG.shape

    @classmethod
    def of_fp8(cls, values_NK: Tensor, scales_NG: Tensor, *, group_size: int, dtype: torch.dtype) -> Self:
        K = values_NK.shape[1]
        codes = values_NK.contiguous().view(torch.uint8)
        return cls(codes, scales_NG.float().contiguous(), K, min(group_size, K), "e4m3", dtype)

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def bits(self) -> int:
        return 8 if self.kind == "e4m3" else 4

    def wide_rows(self) -> Tensor:
        """[N, K] in float32."""
        scales_NK = self.scales_NG.repeat_interleave(self.group_size, dim=1)[:, : self.num_inputs]
        return self._values().mul_(scales_NK)

    def rows(self) -> Tensor:
        """[N, K] in `dtype`."""
        return self.wide_rows().to(self.dtype)

    def outputs(self, rows: range) -> GroupedFloatWeight:
        """Some outputs alone, over the same memory."""
        part = slice(rows.start, rows.stop)
        return replace(self, codes=self.codes[part], scales_NG=self.scales_NG[part])

    def reordered(self, order_N: Tensor) -> GroupedFloatWeight:
        """Its outputs in another order: output i is output order[i] of these."""
        return replace(self, codes=self.codes[order_N], scales_NG=self.scales_NG[order_N])

    def inputs(self, columns: range) -> GroupedFloatWeight:
        """Some inputs alone. Groups become smaller where `columns` begin within one."""
        size = math.gcd(self.group_size, columns.start)
        fine = self.regrouped(size)
        kept = slice(columns.start, columns.stop)
        codes = self.codes[:, kept] if self.kind == "e4m3" else pack_nibbles(self._codes_NK()[:, kept])
        return replace(
            self,
            codes=codes.contiguous(),
            scales_NG=fine.scales_NG[:, columns.start // size : -(-columns.stop // size)].contiguous(),
            num_inputs=len(columns),
            group_size=size,
        )

    def regrouped(self, size: int) -> GroupedFloatWeight:
        """The same weights in groups of `size`, a divisor of `group_size`."""
        if size == self.group_size:
            return self
        assert self.group_size >= self.num_inputs or self.group_size % size == 0, (self.group_size, size)
        first_G = torch.arange(0, self.num_inputs, size, device=self.codes.device) // self.group_size
        return replace(self, scales_NG=self.scales_NG[:, first_G], group_size=size)

    def in_integers(self) -> GroupedWeight:
        """The same weights, of e2m1, as integers of 8 bits, in twice the memory: twice a value is a whole number."""
        assert self.kind == "e2m1"
        codes_NK = (2 * self._values() + ZERO_OF_8_BITS).to(torch.uint8)
        scales_NG = self.scales_NG / 2
        return GroupedWeight.of_codes(
            codes_NK, scales_NG, group_size=self.group_size, bits=8, zero=ZERO_OF_8_BITS, dtype=self.dtype
        )

    def _values(self) -> Tensor:
        if self.kind == "e4m3":
            return self.codes.view(torch.float8_e4m3fn).float()
        codes = self._codes_NK()
        values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
        return values[codes.int()]

    def _codes_NK(self) -> Tensor:
        return self.codes if self.kind == "e4m3" else unpack_nibbles(self.codes, self.num_inputs)


def stack_grouped_floats(parts: Sequence[GroupedFloatWeight]) -> GroupedFloatWeight:
    """One below the other, exactly, in groups of the greatest common divisor of the parts' sizes. All are of one kind
    and have the same inputs."""
    assert len({(part.kind, part.num_inputs) for part in parts}) == 1
    size = math.gcd(*(part.group_size for part in parts))
    parts = [part.regrouped(size) for part in parts]
    codes, scales_NG = (torch.cat(pieces) for pieces in zip(*((p.codes, p.scales_NG) for p in parts), strict=True))
    return replace(parts[0], codes=codes, scales_NG=scales_NG)
