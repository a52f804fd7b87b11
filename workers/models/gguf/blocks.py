"""llama.cpp's blocks of quantized weights, taken apart into codes, scales and minimums: exactly.

The layouts are those of ggml-common.h (https://github.com/ggml-org/llama.cpp); each function takes the bytes of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

# B blocks, C codes of a block, S scales of a block

_SUPER: Final = 256
"""Weights of a block of the K kinds."""
_IQ4_VALUES: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Codes:
    """weight = scales * (code - zero) + minimums. One code a byte, [B, C]; scales and minimums [B, S], float32 or
    float16."""

    codes_BC: Tensor
    scales_BS: Tensor
    minimums_BS: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockKind:
    """`size` weights in `num_bytes`, in groups of `group_size`; `bits` and `zero` are those of the codes as kept."""

    size: int
    num_bytes: int
    group_size: int
    bits: Literal[4, 8]
    zero: int
    unpack: Callable[[Tensor], Codes]


def _nibbles(octets: Tensor) -> Tensor:
    """The lower four bits of all bytes, then the upper ones: [B, 2 C]."""
    return torch.cat([octets & 15, octets >> 4], dim=1)


def _half(octets: Tensor) -> Tensor:
    """float16 of two bytes: [B, 1]."""
    return octets.contiguous().view(torch.float16)


def _q4_0(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 2:]), _half(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 4:]), _half(blocks[:, :2]), _half(blocks[:, 2:4]))


def _fifth_bits(octets: Tensor) -> Tensor:
    """Bit i of four bytes, as 16 for the i-th code."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((octets.unsqueeze(-1) >> shifts) & 1).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Codes(codes + (128 - 16), _half(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return Codes(codes + 128, _half(blocks[:, :2]), _half(blocks[:, 2:4]))


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(blocks[:, 2:] ^ 128, _half(blocks[:, :2]))


def _two_bits(octets: Tensor) -> Tensor:
    """Codes of 2 bits from 64 bytes: 32 bytes have four times 32 codes, the lowest bits first."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    return ((octets.view(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


def _q2_k(blocks: Tensor) -> Codes:
    scales, most = blocks[:, :16], blocks[:, 80:]
    return Codes(
        _two_bits(blocks[:, 16:80].contiguous()),
        _half(most[:, :2]).float() * (scales & 15).float(),
        -_half(most[:, 2:]).float() * (scales >> 4).float(),
    )


def _q3_k(blocks: Tensor) -> Codes:
    high_bits = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    third = ((blocks[:, None, :32] >> high_bits) & 1).flatten(1) << 2
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 4, 1)
    scales = torch.cat([low & 15, low >> 4], dim=1) | (((high.unsqueeze(1) >> shifts) & 3).flatten(1) << 4)
    codes = _two_bits(blocks[:, 32:96].contiguous()) | third
    return Codes(codes + (8 - 4), _half(blocks[:, 108:]).float() * (scales.float() - 32))


def _six_bit_pairs(octets: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minimums of 12 bytes."""
    first, second, third = octets[:, :4], octets[:, 4:8], octets[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return scales, minimums


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scales, minimums = _six_bit_pairs(blocks[:, 4:16])
    return _half(blocks[:, :2]).float() * scales.float(), -_half(blocks[:, 2:4]).float() * minimums.float()


def _runs(octets: Tensor, length: int = 32) -> Tensor:
    """Of so many bytes each, codes in the lower bits, then as many in the upper."""
    runs = octets.reshape(len(octets), -1, 1, length)
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def _q4_k(blocks: Tensor) -> Codes:
    return Codes(_runs(blocks[:, 16:]), *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> Codes:
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    fifth = ((blocks[:, None, 16:48] >> shifts) & 1).flatten(1) << 4
    return Codes((_runs(blocks[:, 48:]) | fifth) + 128, *_k_scales(blocks))


def _q6_k(blocks: Tensor) -> Codes:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    low_bits = torch.stack([low[..., :32] & 15, low[..., 32:] & 15, low[..., :32] >> 4, low[..., 32:] >> 4], dim=2)
    codes = (low_bits | (((high.unsqueeze(2) >> shifts) & 3) << 4)).flatten(1)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Codes(codes + (128 - 32), _half(blocks[:, 208:]).float() * scales)


def _iq4_codes(nibbles: Tensor) -> Tensor:
    return (torch.tensor(_IQ4_VALUES) + 128).to(torch.uint8)[nibbles.int()]


def _iq4_nl(blocks: Tensor) -> Codes:
    return Codes(_iq4_codes(_nibbles(blocks[:, 2:])), _half(blocks[:, :2]))


def _iq4_xs(blocks: Tensor) -> Codes:
    high = blocks[:, 2:4].contiguous().view(torch.int16).int() & 0xFFFF
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
    scales = low.int() | (((high >> torch.arange(0, 16, 2)) & 3) << 4)
    return Codes(_iq4_codes(_runs(blocks[:, 8:], 16)), _half(blocks[:, :2]).float() * (scales - 32).float())


KINDS: Final[Mapping[str, BlockKind]] = {
    "Q4_0": BlockKind(32, 18, 32, 4, 8, _q4_0),
    "Q4_1": BlockKind(32, 20, 32, 4, 0, _q4_1),
    "Q5_0": BlockKind(32, 22, 32, 8, 128, _q5_0),
    "Q5_1": BlockKind(32, 24, 32, 8, 128, _q5_1),
    "Q8_0": BlockKind(32, 34, 32, 8, 128, _q8_0),
    "Q2_K": BlockKind(_SUPER, 84, 16, 4, 0, _q2_k),
    "Q3_K": BlockKind(_SUPER, 110, 16, 4, 8, _q3_k),
    "Q4_K": BlockKind(_SUPER, 144, 32, 4, 0, _q4_k),
    "Q5_K": BlockKind(_SUPER, 176, 32, 8, 128, _q5_k),
    "Q6_K": BlockKind(_SUPER, 210, 16, 8, 128, _q6_k),
    "IQ4_NL": BlockKind(32, 18, 32, 8, 128, _iq4_nl),
    "IQ4_XS": BlockKind(_SUPER, 136, 32, 8, 128, _iq4_xs),
}
