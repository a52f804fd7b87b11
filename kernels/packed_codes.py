"""`PackedCodes`: a matrix of 4-bit or 8-bit codes in groups, in the order in which GPU kernels read it.

Made while a model is loaded, from weights of integers or floats in groups, exactly. `kernels.linear.grouped_few`
multiplies by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.grouped_float_weight import E2M1_VALUES, GroupedFloatWeight
from tensorweave.kernels.grouped_weight import GroupedWeight, unpack_nibbles

# N outputs, K inputs, B blocks of 128 inputs, A tiles of 16 outputs, G groups of inputs; a record is a tile's block

TILE: Final = 16
BLOCK: Final = 128
_NUMBER_TYPES: Final = (torch.float16, torch.bfloat16)
_GROUPS: Final = (32, 64, 128)
# Places of 8 neighbouring inputs among the nibbles of a word, and of 4 among its bytes.
_NIBBLES: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_BYTES: Final = (0, 2, 1, 3)


@dataclass(frozen=True, slots=True)
class CodeForm:
    """`group`: inputs that share a scale, 32, 64 or 128. `numbers`: the type of scales and offsets."""

    bits: int
    is_float: bool
    group: int
    numbers: torch.dtype
    has_offsets: bool

    @property
    def code_bytes(self) -> int:
        """The codes' bytes in a record."""
        return TILE * BLOCK * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """The scales' bytes in a record; the offsets, if there are any, have as many."""
        return BLOCK // self.group * TILE * self.numbers.itemsize

    @property
    def record_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes * (1 + self.has_offsets)


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """weight = scales * (value of the code + offsets), in float32. `zero` is what integers' codes count from.

    `records` are uint8 [A, B, record]. A record has its codes first: for each 32 inputs, each lane 4 g + t of 32, and
    outputs g and g + 8 of the tile, those of inputs [8 t, 8 t + 8). Then scales [groups of the block, 16], then
    offsets. Outputs beyond N and inputs beyond K have scales of 0. `dtype` is that of the rows it multiplies.
    """

    records: Tensor
    num_outputs: int
    num_inputs: int
    zero: int
    form: CodeForm
    dtype: torch.dtype

    @staticmethod
    def can_pack(weight: GroupedWeight | GroupedFloatWeight) -> bool:
        """Groups must be whole rows, or multiples of 32 inputs."""
        return weight.group_size >= weight.num_inputs or weight.group_size % min(_GROUPS) == 0

    @classmethod
    def of(cls, weight: GroupedWeight | GroupedFloatWeight) -> Self:
        """On the device of the weight, which `can_pack` takes."""
        assert cls.can_pack(weight)
        has_one_group = weight.group_size >= weight.num_inputs
        group = BLOCK if has_one_group else max(g for g in _GROUPS if weight.group_size % g == 0)
        fine = weight.regrouped(group)
        offsets_NG = _offsets(fine)
        scales_NG = _nonzero(fine) if offsets_NG is not None else fine.scales_NG.float()
        numbers = [scales_NG] if offsets_NG is None else [scales_NG, offsets_NG]
        kind = next((t for t in _NUMBER_TYPES if all(torch.equal(x.to(t).float(), x) for x in numbers)), torch.float32)
        is_float = isinstance(weight, GroupedFloatWeight)
        form = CodeForm(weight.bits, is_float, group, kind, offsets_NG is not None)
        zero = weight.zero if isinstance(weight, GroupedWeight) else 0
        parts = [_pack_codes(_codes_of(weight), form), *(_pack_numbers(x, form) for x in numbers)]
        records = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=2)
        return cls(records, weight.num_outputs, weight.num_inputs, zero, form, weight.dtype)

    def outputs_from(self, first: int) -> PackedCodes:
        """Outputs [first, N) alone, over the same memory; `first` is a multiple of 16."""
        assert first % TILE == 0
        return replace(self, records=self.records[first // TILE :], num_outputs=self.num_outputs - first)

    def wide_rows(self) -> Tensor:
        """[N, K] in float32."""
        form = self.form
        values = self._values()
        scales_NG = self._numbers(form.code_bytes)
        groups_NGS = values.view(*scales_NG.shape, form.group)
        if form.has_offsets:
            groups_NGS = groups_NGS + self._numbers(form.code_bytes + form.scale_bytes).unsqueeze(2)
        return (groups_NGS * scales_NG.unsqueeze(2)).flatten(1)[: self.num_outputs, : self.num_inputs]

    def rows(self) -> Tensor:
        """[N, K] in `dtype`."""
        return self.wide_rows().to(self.dtype)

    def _values(self) -> Tensor:
        """[16 A, 128 B] in float32."""
        form, (A, B, _) = self.form, self.records.shape
        codes = self.records[:, :, : form.code_bytes]
        if form.bits == 4:
            words = unpack_nibbles(codes.reshape(-1, 4), 8)
            eights = torch.empty_like(words)
            eights[:, list(_NIBBLES)] = words
        else:
            words = codes.reshape(-1, 2, 4)
            eights = torch.empty_like(words)
            eights[:, :, list(_BYTES)] = words
        codes_NK = eights.view(A, B, 4, 8, 4, 2, 8).permute(0, 5, 3, 1, 2, 4, 6).reshape(A * TILE, B * BLOCK)
        if not form.is_float:
            return codes_NK.float() - self.zero
        if form.bits == 8:
            return codes_NK.view(torch.float8_e4m3fn).float()
        values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
        return values[codes_NK.int()]

    def _numbers(self, first: int) -> Tensor:
        """[16 A, groups] in float32."""
        form, (A, B, _) = self.form, self.records.shape
        found = self.records[:, :, first : first + form.scale_bytes].contiguous().view(form.numbers)
        return found.view(A, B, -1, TILE).permute(0, 3, 1, 2).reshape(A * TILE, -1).float()


def _codes_of(weight: GroupedWeight | GroupedFloatWeight) -> Tensor:
    """[N, K], one a byte."""
    return weight.codes if weight.bits == 8 else unpack_nibbles(weight.codes, weight.num_inputs)


def _pack_codes(codes_NK: Tensor, form: CodeForm) -> Tensor:
    N, K = codes_NK.shape
    padded = F.pad(codes_NK, (0, -K % BLOCK, 0, -N % TILE))
    A, B = padded.shape[0] // TILE, padded.shape[1] // BLOCK
    # outputs 8 r + g of a tile, inputs 32 h + 8 t + c of a block: to lanes 4 g + t
    eights = padded.view(A, 2, 8, B, 4, 4, 8).permute(0, 3, 4, 2, 5, 1, 6)
    if form.bits == 8:
        return eights.reshape(A, B, -1, 2, 4)[..., list(_BYTES)]
    ordered = eights[..., list(_NIBBLES)]
    return ordered[..., 0::2] | ordered[..., 1::2] << 4


def _pack_numbers(numbers_NG: Tensor, form: CodeForm) -> Tensor:
    """To [A, B, groups, 16], as bytes."""
    N, G = numbers_NG.shape
    per_block = BLOCK // form.group
    padded = F.pad(numbers_NG, (0, -G % per_block, 0, -N % TILE))
    tiles = padded.view(-1, TILE, padded.shape[1] // per_block, per_block).permute(0, 2, 3, 1).contiguous()
    return tiles.to(form.numbers).view(torch.uint8)


def _offsets(weight: GroupedWeight | GroupedFloatWeight) -> Tensor | None:
    """What is added to a code's value before its scale. Whole numbers, where checkpoints have zero points."""
    if isinstance(weight, GroupedFloatWeight) or weight.minimums_NG is None:
        return None
    scales_NG, minimums_NG = _nonzero(weight), weight.minimums_NG.float()
    exact_NG = minimums_NG / scales_NG
    whole_NG = exact_NG.round()
    return torch.where(whole_NG * scales_NG == minimums_NG, whole_NG, exact_NG)


def _nonzero(weight: GroupedWeight | GroupedFloatWeight) -> Tensor:
    """Scales in float32; of groups that have minimums alone, one so small that codes count for nothing."""
    scales_NG = weight.scales_NG.float()
    return torch.where(scales_NG == 0, torch.full_like(scales_NG, 2.0**-40), scales_NG)
