"""Decode attention of one layer: inputs on every edge, what must come out in float64, and a run of some form of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.attention.triton_decode import DecodeWorkspace, HeadRotation
from tensorweave.kernels.linear.triton_quantize import make_peaks
from tensorweave.kernels.weights import FP8

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # relative error of the whole result in the Frobenius norm
EPSILON = 1e-6


@dataclass
class Case:
    heads_RXH: Tensor
    cache_BCPH: Tensor
    table_RW: Tensor
    lengths_R: Tensor
    rotation: HeadRotation | None
    window: int | None

    @property
    def scale(self) -> float:
        return self.cache_BCPH.shape[-1] ** -0.5


def make_case(
    lengths: list[int], N: int, K: int, H: int, P: int, dtype: torch.dtype, device: torch.device,
    *, rotates: bool, normed: bool = False, window: int | None = None, kv_dtype: torch.dtype | None = None,
) -> Case:  # fmt: skip
    R, W = len(lengths), -(-max(lengths) // P) + 2
    cache = torch.randn(R * W + 1, 2 * K, P, H, device=device).to(kv_dtype or dtype)
    table = torch.randperm(R * W, device=device)[: R * W].view(R, W).int() + 1
    rotation = None
    if rotates:
        angles = torch.rand(max(lengths) + 1, H // 2, device=device) * 6
        gains = [torch.rand(H, device=device).add(0.5).to(dtype) if normed else None for _ in range(2)]
        rotation = HeadRotation(torch.cat([angles.cos(), angles.sin()], -1), *gains, EPSILON)
    heads = torch.randn(R, N + 2 * K if rotates else N, H, device=device).to(dtype)
    return Case(heads, cache, table, torch.tensor(lengths, dtype=torch.int32, device=device), rotation, window)


def poison_unused(case: Case) -> None:
    """NaN in every slot that no row may read: past its length, and before its window by a block or more."""
    P = case.cache_BCPH.shape[2]
    used = torch.zeros(case.cache_BCPH.shape[0], P, dtype=torch.bool)
    for row, length in enumerate(case.lengths_R.tolist()):
        first = 0 if case.window is None else max(0, length - case.window)
        last = length - 1 if case.rotation is not None else length
        for at in range(first, last):
            used[case.table_RW[row, at // P], at % P] = True
    unused = ~used[:, None, :, None].to(case.cache_BCPH.device)
    if case.cache_BCPH.dtype == FP8:
        case.cache_BCPH.view(torch.uint8).masked_fill_(unused, 0x7F)
    else:
        case.cache_BCPH.masked_fill_(unused, float("nan"))


def rotated(x: Tensor, gain: Tensor | None, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 heads [.., H] normed and rotated, rounded as the cache holds them."""
    wide = x.double()
    if gain is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gain.double()
    left, right = wide.chunk(2, -1)
    cos, sin = angles.double().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(dtype)


def reference(case: Case, N: int) -> tuple[Tensor, Tensor]:
    """The result in float64, and what the cache must hold afterwards."""
    dtype = case.cache_BCPH.dtype
    cache = case.cache_BCPH.float() if dtype == FP8 else case.cache_BCPH.clone()
    _, C, P, H = cache.shape
    K = C // 2
    result = torch.zeros(len(case.heads_RXH), N, H, dtype=torch.float64, device=cache.device)
    for row, length in enumerate(case.lengths_R.tolist()):
        if not length:
            continue
        blocks, heads = case.table_RW[row].long(), case.heads_RXH[row]
        q = heads[:N]
        if case.rotation is not None:
            angles = case.rotation.table_LH[length - 1]
            q = rotated(q, case.rotation.query_norm_H, angles, q.dtype)
            key = rotated(heads[N : N + K], case.rotation.key_norm_H, angles, dtype).to(cache.dtype)
            place = blocks[(length - 1) // P], (length - 1) % P
            cache[place[0], :K, place[1]] = key
            cache[place[0], K:, place[1]] = heads[N + K :].to(dtype).to(cache.dtype)
        first = 0 if case.window is None else max(0, length - case.window)
        kept = cache[blocks].transpose(0, 1).reshape(C, -1, H)[:, first:length].double()
        scores = torch.einsum("kgh,klh->kgl", q.double().view(K, N // K, H), kept[:K]) * case.scale
        result[row] = torch.einsum("kgl,klh->kgh", scores.softmax(-1), kept[K:]).reshape(N, H)
    return result, cache


def run(attend: Callable[..., None], case: Case, N: int, splits: int, pdl: bool) -> Tensor:
    R, H, K = len(case.heads_RXH), case.heads_RXH.shape[-1], case.cache_BCPH.shape[1] // 2
    workspace = DecodeWorkspace.create(R, N, K, H, splits, case.heads_RXH.device)
    workspace.parts.fill_(float("nan"))
    workspace.stats.fill_(float("nan"))
    out = torch.full((R, N, H), float("nan"), dtype=case.heads_RXH.dtype, device=case.heads_RXH.device)
    peaks = make_peaks(R, device=case.heads_RXH.device)
    attend(
        case.heads_RXH, case.cache_BCPH, case.table_RW, case.lengths_R, out, workspace,
        scale=case.scale, num_splits=splits, rotation=case.rotation, window=case.window, peaks_RA=peaks, pdl=pdl,
    )  # fmt: skip
    assert not workspace.arrived.any(), "counters must be zero again"
    assert torch.equal(peaks.view(torch.float32).amax(1), out.float().abs().amax((1, 2)))
    return out


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()
