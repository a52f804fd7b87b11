"""The device's tokens against a numpy form of the same rule: greedy, Gumbel-max, thresholds; and their distribution."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.argmax.reference import NO_PLACE, NOTHING_LEFT
from tensorweave.kernels.sample.chosen import choose_sampler
from tensorweave.kernels.sample.rule import (
    GREATEST_TEMPERATURE,
    LEAST_TEMPERATURE,
    SamplingParameters,
    TokenTarget,
)
from tensorweave.kernels.sample.triton import SamplingWorkspace, argmax, sample
from tests.kernels.sample.plain_rule import keys_of, limit_of, scores_of

pytestmark = pytest.mark.gpu

# Scores nearer to each other than this may be ordered otherwise by the device's logarithm, keys by its rounding.
SCORE_TOLERANCE = 3e-5


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
        torch.arange(rows, dtype=torch.int32, device=device) + position,
    )


def draw(
    logits: Tensor, parameters: SamplingParameters, has_limits: bool, pdl: bool, workspace: SamplingWorkspace
) -> Tensor:
    out = torch.full((len(logits),), -77, dtype=torch.int64, device=logits.device)
    sample(logits, parameters, TokenTarget(out), workspace, has_limits=has_limits, pdl=pdl)
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
        expected[:3] = torch.tensor([NO_PLACE, NO_PLACE, NOTHING_LEFT])
    out = torch.full((R,), -77, dtype=torch.int64, device=device)
    argmax(logits, TokenTarget(out), SamplingWorkspace.create(R, device), pdl=pdl)
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
            scores = scores_of(x, temperature, row * 12345678901 - 7, row + position)
            limit = limit_of(x, temperature, top_k, top_p, min_p)
            keys = keys_of(x, temperature)
            best = scores[keys <= limit].max()
            assert keys[ours[row]] <= limit + 1, (CASES[row], "a token that the limits forbid")
            assert scores[ours[row]] >= best - SCORE_TOLERANCE * max(temperature, 1), (CASES[row], "not the best score")


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
    assert ours[:3] == [NO_PLACE, NO_PLACE, NOTHING_LEFT]
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
        (torch.arange(rows, device=device) % 7).int(),
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


@pytest.mark.parametrize("V", [33, 5000])
def test_tokens_are_those_of_the_cpu(V: int, device: torch.device, pdl: bool) -> None:
    """All limits and temperatures; at most one row in a hundred differs by rounding."""
    cases = [*CASES, (LEAST_TEMPERATURE, 3, 0.9, 0.0), (GREATEST_TEMPERATURE, 7, 0.5, 0.0)]
    count = 8 if device.type == "cuda" else 1
    logits = torch.randn(count * len(cases), V) * 2
    temperature, top_k, top_p, min_p = map(list, zip(*(cases * count), strict=True))
    parameters = make_parameters(torch.device("cpu"), temperature, top_k, top_p, min_p, 5)
    expected = TokenTarget.create(len(logits), logits.device)
    choose_sampler(logits.device).sample(logits, parameters, expected, has_limits=True)
    numbers = (getattr(parameters, field.name).to(device) for field in dataclasses.fields(parameters))
    workspace = SamplingWorkspace.create(len(logits), device)
    ours = draw(logits.to(device), SamplingParameters(*numbers), True, pdl, workspace)
    assert (ours.cpu() != expected.tokens_R).sum() <= len(logits) // 100


def test_newest_tokens_go_to_their_slots(device: torch.device, pdl: bool) -> None:
    logits = torch.randn(3, 20, device=device)
    logits[1] = torch.nan
    newest = torch.full((6,), 9, dtype=torch.int32, device=device)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    target = TokenTarget(torch.empty(3, dtype=torch.int64, device=device), slots, newest)
    workspace = SamplingWorkspace.create(3, device)
    first, _, last = logits.argmax(-1).tolist()
    argmax(logits, target, workspace, pdl=pdl)
    assert target.tokens_R.tolist() == [first, NO_PLACE, last]
    assert newest.tolist() == [0, 9, last, 9, first, 9]
    parameters = make_parameters(device, [0.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3, 0)
    sample(logits.roll(1, 0), parameters, target, workspace, has_limits=False, pdl=pdl)
    assert newest.tolist() == [first, 9, 0, 9, last, 9]
