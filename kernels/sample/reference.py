"""Tokens from logits in torch, on any device: greedy, and drawn by the rule of `kernels.sample.rule`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.argmax.reference import argmax
from tensorweave.kernels.sample.rule import (
    KEYS_PER_UNIT,
    LARGEST_W,
    LAST_KEY,
    MASS_OF_LARGEST,
    SamplingParameters,
    TokenTarget,
)

# R rows of logits, V vocabulary

_LOW_32: Final = 0xFFFFFFFF


class ReferenceSampler:
    """Satisfies `kernels.sample.chosen.Sampler`."""

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        target.tokens_R.copy_(argmax(logits_RV))
        target.leave_newest()

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        score_RV = scores(logits_RV, parameters)
        if has_limits:
            is_dropped_RV = ~_kept(logits_RV.float(), parameters) & (parameters.temperature_R.unsqueeze(1) > 0)
            score_RV.masked_fill_(is_dropped_RV & (score_RV != torch.inf), -torch.inf)
        target.tokens_R.copy_(argmax(score_RV))
        target.leave_newest()


def scores(logits_RV: Tensor, parameters: SamplingParameters, first: int = 0) -> Tensor:
    """Float32 [R, V]: the largest of a row is its token's, without limits; plus infinity where there is no number.
    `first` is the id of the first column's token."""
    logits_RV = logits_RV.float()
    temperature_R1 = parameters.temperature_R.unsqueeze(1)
    number_RV = gumbel(parameters.seed_R, parameters.position_R, logits_RV.shape[1], first)
    score_RV = torch.where(temperature_R1 > 0, logits_RV + temperature_R1 * number_RV, logits_RV)
    return score_RV.masked_fill_(logits_RV.isnan() | (logits_RV == torch.inf), torch.inf)


def gumbel(seed_R: Tensor, position_R: Tensor, vocab_size: int, first: int = 0) -> Tensor:
    """Float32 [R, V]: -log(-log(1 - w)) of the uniform numbers w = (hash + 1/2) / 2³² of tokens from `first` on."""
    row_R = _mix64(seed_R * _signed(0x9E3779B97F4A7C15) + _signed(0xD1B54A32D192ED03))
    row_R = _mix64(row_R + (position_R.long() + 1) * _signed(0x9E3779B97F4A7C15))
    low_R1, high_R1 = (row_R & _LOW_32).unsqueeze(1), (row_R >> 32 & _LOW_32).unsqueeze(1)
    token_V = torch.arange(first, first + vocab_size, dtype=torch.int64, device=seed_R.device)
    hash_RV = _mix32((token_V * 0x9E3779B1 + low_R1) & _LOW_32, high_R1)
    w_RV = ((hash_RV.float() + 0.5) * 2.0**-32).clamp_max_(LARGEST_W).double()
    return -(-(-w_RV).log1p()).log().float()


def _mix64(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), in integers that wrap."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _mix32(h: Tensor, key: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, with a key in its middle."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _LOW_32
    h = ((h ^ (h >> 13) ^ key) * 0xC2B2AE35) & _LOW_32
    return h ^ (h >> 16)


def _shift_right(z: Tensor, count: int) -> Tensor:
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _kept(logits_RV: Tensor, parameters: SamplingParameters) -> Tensor:
    """Whether each token is within its row's min-p, top-k and top-p."""
    V = logits_RV.shape[1]
    temperature_R1 = parameters.temperature_R.unsqueeze(1)
    z_RV = (logits_RV.nan_to_num(-torch.inf).amax(dim=-1, keepdim=True) - logits_RV) / temperature_R1
    key_RV = (z_RV.nan_to_num_(0.0, posinf=torch.inf) * KEYS_PER_UNIT).clamp_max_(LAST_KEY).long()
    min_p_R1 = parameters.min_p_R.unsqueeze(1)
    limit_R1 = (-min_p_R1.log() * KEYS_PER_UNIT).clamp_(max=LAST_KEY).long()
    mass_RV = ((-z_RV).exp_() * MASS_OF_LARGEST + 0.5).long().masked_fill_(key_RV > limit_R1, 0)
    sorted_RV, order_RV = key_RV.masked_fill(key_RV > limit_R1, LAST_KEY + 1).sort(dim=-1)
    top_k_R1 = parameters.top_k_R.long().unsqueeze(1)
    kth_R1 = sorted_RV.gather(1, (top_k_R1 - 1).clamp_(0, V - 1))
    limit_R1 = torch.where((top_k_R1 > 0) & (top_k_R1 <= V), torch.minimum(limit_R1, kth_R1), limit_R1)
    mass_RV = mass_RV.gather(1, order_RV).masked_fill_(sorted_RV > limit_R1, 0)
    top_p_R1 = parameters.top_p_R.double().unsqueeze(1)
    before_RV = mass_RV.cumsum(dim=-1) - mass_RV
    is_first_RV = torch.ones_like(sorted_RV, dtype=torch.bool)
    is_first_RV[:, 1:] = sorted_RV[:, 1:] != sorted_RV[:, :-1]
    is_within_RV = is_first_RV & (before_RV < top_p_R1 * mass_RV.sum(dim=-1, keepdim=True))
    last_R1 = sorted_RV.masked_fill(~is_within_RV, 0).amax(dim=-1, keepdim=True)
    return key_RV <= torch.where(top_p_R1 < 1, torch.minimum(limit_R1, last_R1), limit_R1)
