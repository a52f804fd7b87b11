"""The device's tokens against a numpy form of the same rule: greedy, Gumbel-max, thresholds; and their distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.sample.triton import SamplingParameters, SamplingWorkspace, argmax, sample
from tensorweave.kernels.sample.triton_kernels import BINS, KEYS_PER_UNIT, MASS_OF_LARGEST, NO_PLACE

pytestmark = pytest.mark.gpu

_MASK = (1 << 64) - 1
_LAST_KEY = BINS * BINS - 1
# Scores nearer to each other than this may be ordered otherwise by the device's logarithm, keys by its rounding.
SCORE_TOLERANCE = 3e-5


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix32(h: np.ndarray) -> np.ndarray:
    h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & np.uint64(0xFFFFFFFF)
    h = ((h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & np.uint64(0xFFFFFFFF)
    return h ^ (h >> np.uint64(16))


def gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    row = mix64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK)
    row = mix64((row + (position + 1) * 0x9E3779B97F4A7C15) & _MASK)
    token = np.arange(vocab_size, dtype=np.uint64)
    mixed = (token * np.uint64(0x9E3779B1) + np.uint64(row & 0xFFFFFFFF)) & np.uint64(0xFFFFFFFF)
    h = mix32(mix32(mixed) ^ np.uint64(row >> 32))
    w = (h.astype(np.float32) + np.float32(0.5)).astype(np.float64) * 2.0**-32
    with np.errstate(divide="ignore"):
        return -np.log(-np.log1p(-w))


def limit_of(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """The largest key that stays; and the keys, as the module's docstring says."""
    keys = keys_of(logits, temperature)
    z = (logits.max() - logits).astype(np.float32) / np.float32(temperature)
    mass = np.floor(np.exp(-z.astype(np.float64)) * MASS_OF_LARGEST + 0.5).astype(np.int64)
    limit = min(int(-math.log(min_p) * KEYS_PER_UNIT), _LAST_KEY) if min_p > 0 else _LAST_KEY
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] <= limit]
    if 0 < top_k <= len(order):
        limit = int(keys[order[top_k - 1]])
        order = order[keys[order] <= limit]
    if top_p < 1:
        ordered, first = np.unique(keys[order], return_index=True)
        before = np.concatenate([[0], np.cumsum(mass[order])])[first]
        target = float(np.float32(top_p)) * float(mass[order].sum())
        limit = min(limit, int(ordered[np.flatnonzero(before < target)[-1]]))
    return limit


def keys_of(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = (logits.max() - logits).astype(np.float32) / np.float32(temperature)
    return np.minimum(z * np.float32(KEYS_PER_UNIT), np.float32(_LAST_KEY)).astype(np.int64)


def make_parameters(
    device: torch.device,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: list[float],
    position: int,
) -> SamplingParameters:
    rows = len(temperature)
    return SamplingParameters(
        torch.tensor(temperature, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
        torch.arange(rows, device=device) * 12345678901 - 7,
        torch.arange(rows, device=device) + position,
    )


def draw(
    logits: Tensor, parameters: SamplingParameters, has_limits: bool, pdl: bool, workspace: SamplingWorkspace
) -> Tensor:
    out = torch.full((len(logits),), -77, dtype=torch.int64, device=logits.device)
    sample(logits, parameters, out, workspace, has_limits=has_limits, pdl=pdl)
    assert not workspace.bins.any(), "histograms must be zero again"
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("R", "V"), [(1, 128256), (3, 5), (5, 49152), (300, 4097)])
def test_argmax(R: int, V: int, dtype: torch.dtype, device: torch.device, pdl: bool) -> None:
    logits = torch.randn(R, V, device=device).to(dtype)
    expected = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)  # the first of equals
    if R >= 3:
        logits[0, V - 1] = float("nan")
        logits[1, 0] = float("inf")
        logits[2] = float("-inf")
        expected[:3] = NO_PLACE
    out = torch.full((R,), -77, dtype=torch.int64, device=device)
    argmax(logits, out, SamplingWorkspace.create(R, device), pdl=pdl)
    assert torch.equal(out, expected)


CASES = [  # temperature, top-k, top-p, min-p
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.3, 0.0),
    (2.5, 0, 0.9, 0.0), (0.7, 40, 0.8, 0.0), (1.0, 0, 1.0, 0.2), (1.3, 1000, 0.95, 0.01), (1.0, 1, 1.0, 0.0),
    (1.0, 3, 0.01, 0.5), (0.01, 50, 0.9, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [300, 9001])
def test_equals_the_rule(V: int, dtype: torch.dtype, device: torch.device, pdl: bool) -> None:
    workspace = SamplingWorkspace.create(len(CASES), device)
    for position in range(3 if device.type == "cpu" else 20):
        logits = (torch.randn(len(CASES), V, device=device) * 3).to(dtype)
        logits[:, 7] = float("-inf")
        parameters = make_parameters(device, *map(list, zip(*CASES, strict=True)), position)  # type: ignore[arg-type]
        ours = draw(logits, parameters, True, pdl, workspace).tolist()
        for row, (temperature, top_k, top_p, min_p) in enumerate(CASES):
            x = logits[row].float().cpu().numpy()
            if temperature == 0:
                assert ours[row] == x.argmax()
                continue
            scores = x / np.float32(temperature) + gumbel(row * 12345678901 - 7, row + position, V)
            limit = limit_of(x, temperature, top_k, top_p, min_p)
            keys = keys_of(x, temperature)
            best = scores[keys <= limit].max()
            assert keys[ours[row]] <= limit + 1, (CASES[row], "a token that the limits forbid")
            assert scores[ours[row]] >= best - SCORE_TOLERANCE, (CASES[row], "not the best score")


def test_rows_without_limits_need_no_passes(device: torch.device, pdl: bool) -> None:
    """The same tokens with and without the passes for limits, and in any batch."""
    logits = torch.randn(5, 9001, device=device)
    parameters = make_parameters(device, [1.0, 0.5, 0.0, 2.0, 1.0], [0] * 5, [1.0] * 5, [0.0] * 5, 3)
    workspace = SamplingWorkspace.create(5, device)
    plain = draw(logits, parameters, False, pdl, workspace)
    assert torch.equal(draw(logits, parameters, True, pdl, workspace), plain)
    one = SamplingParameters(
        parameters.temperature_R[3:4], parameters.top_k_R[3:4], parameters.top_p_R[3:4], parameters.min_p_R[3:4],
        parameters.seed_R[3:4], parameters.position_R[3:4],
    )  # fmt: skip
    assert draw(logits[3:4], one, False, pdl, workspace)[0] == plain[3]


def test_rows_that_are_not_finite_get_no_token(device: torch.device, pdl: bool) -> None:
    logits = torch.randn(4, 500, device=device)
    logits[0, 499] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    parameters = make_parameters(device, [1.0] * 4, [0, 5, 5, 5], [0.9] * 4, [0.0] * 4, 0)
    ours = draw(logits, parameters, True, pdl, SamplingWorkspace.create(4, device)).tolist()
    assert ours[:3] == [NO_PLACE] * 3
    assert ours[3] >= 0


def test_follows_the_distribution(device: torch.device, pdl: bool, gpu_only: None) -> None:
    """40,000 draws over 30 tokens: each share within five standard deviations of softmax's."""
    rows, V = 40_000, 30
    logits = torch.randn(V, device=device)
    zeros = torch.zeros(rows, device=device)
    parameters = SamplingParameters(
        zeros + 0.8,
        zeros.int(),
        zeros + 1,
        zeros,
        torch.arange(rows, device=device),
        torch.arange(rows, device=device) % 7,
    )
    tokens = draw(logits.expand(rows, V).contiguous(), parameters, False, pdl, SamplingWorkspace.create(rows, device))
    share = torch.bincount(tokens, minlength=V).double() / rows
    expected = (logits.double() / 0.8).softmax(-1)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt() + 1e-9).all()


def test_full_size_repeats_its_tokens(device: torch.device, pdl: bool, gpu_only: None) -> None:
    rows = 64
    logits = torch.randn(rows, 128256, device=device, dtype=torch.bfloat16) * 2
    parameters = make_parameters(device, [1.0] * rows, [50] * rows, [0.9] * rows, [0.0] * rows, 0)
    workspace = SamplingWorkspace.create(rows, device)
    first = draw(logits, parameters, True, pdl, workspace)
    for _ in range(30):
        assert torch.equal(draw(logits, parameters, True, pdl, workspace), first)
