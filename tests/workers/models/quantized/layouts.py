"""Quantizes matrices into the layouts that AutoAWQ, AutoGPTQ, DeepSeek and compressed-tensors publish, one number at a
time where they pack: independent of the readers that are tested with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# N outputs, K inputs, G groups of inputs

Layout = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A float32 matrix [N, K] to its tensors, named as they follow the module's name, and its dequantized twin."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def fp8_in_blocks(block: tuple[int, int], scale_dtype: torch.dtype = torch.float32) -> Layout:
    """DeepSeek's: weight = values * scales of their block."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        N, K = weight.shape
        scales = torch.empty(-(-N // block[0]), -(-K // block[1]))
        values, plain = torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(N, K)
        for r in range(scales.shape[0]):
            for c in range(scales.shape[1]):
                at = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
                scale = weight[at].abs().max() / 448
                if scale_dtype == torch.float8_e8m0fnu:
                    scale = torch.exp2(torch.log2(scale).ceil())
                scales[r, c] = scale.to(scale_dtype).float()
                values[at] = (weight[at] / scales[r, c]).to(torch.float8_e4m3fn)
                plain[at] = values[at].float() * scales[r, c]
        return {"weight": values, "weight_scale_inv": scales.to(scale_dtype)}, plain

    return quantize


def fp8_whole(*, per_output: bool, name: str = "weight_scale", has_input_scale: bool = False) -> Layout:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        largest = weight.abs().amax(dim=1, keepdim=True) if per_output else weight.abs().max()
        scale = largest / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        more = {"input_scale": torch.tensor(0.7)} if has_input_scale else {}
        return {"weight": values, name: scale, **more}, values.float() * scale

    return quantize


def awq(group_size: int) -> Layout:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes_NK, scales_NG, zeros_NG, plain = asymmetric(weight, group_size, 15)
        tensors = {
            "qweight": pack_columns(codes_NK.T, AWQ_ORDER),
            "qzeros": pack_columns(zeros_NG.T, AWQ_ORDER),
            "scales": scales_NG.T.contiguous(),
        }
        return tensors, plain

    return quantize


def gptq(bits: int, group_size: int, *, offset: int = 1, symmetric: bool = False, seed: int | None = None) -> Layout:
    """With a `seed`, inputs are in random groups of the same size (act-order)."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        N, K = weight.shape
        size = K if group_size == -1 else group_size
        order = torch.arange(K)
        if seed is not None:
            order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
        most = 2**bits - 1
        codes, scales, zeros, plain = asymmetric(weight[:, order], size, most, 2 ** (bits - 1) if symmetric else None)
        groups_K, codes_NK, plain_NK = torch.empty(K, dtype=torch.int32), codes.clone(), plain.clone()
        codes_NK[:, order], plain_NK[:, order] = codes, plain
        groups_K[order] = (torch.arange(K) // size).int()
        per_word = 32 // bits
        tensors = {
            "qweight": pack_rows(codes_NK.T, bits),
            "qzeros": pack_columns(zeros.T - offset, range(per_word), bits),
            "scales": scales.T.contiguous(),
            "g_idx": groups_K,
            "bias": torch.zeros(N, dtype=torch.float16),  # as AutoGPTQ adds to layers that have none
        }
        return tensors, plain_NK

    return quantize


def asymmetric(
    weight: Tensor, group_size: int, most: int, zero: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, float16 scales and zeros of groups, and scales * (codes - zeros). Zeros are at least 1."""
    N, K = weight.shape
    groups = weight.view(N, K // group_size, group_size)
    low, high = groups.amin(-1).clamp_max(-0.01), groups.amax(-1).clamp_min(0.01)
    if zero is None:
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(1, most - 1)
    else:
        scales = (torch.maximum(-low, high) / zero).half()
        zeros = torch.full_like(low, zero)
    codes = ((groups / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, most)
    plain = (codes - zeros.unsqueeze(-1)).double() * scales.double().unsqueeze(-1)
    return codes.view(N, K).int(), scales, zeros.int(), plain.float().view(N, K)


def pack_columns(codes: Tensor, order: Any, bits: int = 4) -> Tensor:
    """Words of 32 / bits columns in succession; `order[i]` is the column at the i-th place from the lowest bits."""
    per_word = 32 // bits
    rows, columns = codes.shape
    words = [[0] * (columns // per_word) for _ in range(rows)]
    for r, row in enumerate(codes.tolist()):
        for w in range(columns // per_word):
            for i, place in enumerate(order):
                words[r][w] |= (row[w * per_word + place] & (2**bits - 1)) << (bits * i)
    return _signed(words)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    return pack_columns(codes.T, range(32 // bits), bits).T.contiguous()


def _signed(words: list[list[int]]) -> Tensor:
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in words]).int()
