"""Inverse frequencies of the kinds of RoPE, and the table from which the engine takes the rows of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensorweave.workers.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, num_positions: int = 0) -> Tensor:
    """[W / 2] float32, in radians per position, for the W elements of a head that are rotated. `num_positions` of the
    table choose between longrope's two sets."""
    width = rope.width(head_dim)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope, width)
        case "longrope":
            factors = rope.long_factors if num_positions > rope.original_max_len else rope.short_factors
            return 1.0 / (torch.tensor(factors) * rope.theta**exponents)
        case "none":
            return torch.zeros_like(plain)
        case _:
            return plain


def rotary_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, W] float32: cosines of each pair, then sines, both times the attention factor."""
    frequencies = inverse_frequencies(rope, head_dim, num_positions)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * rope.attention_factor).to(device)


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, others blended linearly in 1 / wavelength."""
    wavelength = 2 * math.pi / plain
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = (rope.original_max_len / wavelength - rope.low_freq_factor) / span
    blended = (1 - keep) * plain / rope.factor + keep * plain
    is_long = wavelength > rope.original_max_len / rope.low_freq_factor
    is_short = wavelength < rope.original_max_len / rope.high_freq_factor
    return torch.where(is_long, plain / rope.factor, torch.where(is_short, plain, blended))


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, §3.2): pairs that turn more than `beta_fast` times over the original length are kept."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_max_len / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)
