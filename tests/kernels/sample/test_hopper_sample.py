"""The kernel for Hopper against the CPU's native form, which the rule in numpy checks; at full size too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.argmax.reference import NO_PLACE, NOTHING_LEFT
from tensorweave.kernels.sample.chosen import choose_sampler
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
from tests.kernels.forms import CPU
from tests.kernels.sample.test_sample import CASES, make_parameters

pytest.importorskip("triton")

from tensorweave.kernels.sample.hopper import HopperSampler, choose

pytestmark = pytest.mark.gpu


def on_device(parameters: SamplingParameters, device: torch.device) -> SamplingParameters:
    numbers = [getattr(parameters, field.name) for field in dataclasses.fields(parameters)]
    return SamplingParameters(*(each.to(device) for each in numbers))


def draw(logits: Tensor, parameters: SamplingParameters, *, has_limits: bool = True) -> Tensor:
    target = TokenTarget(torch.full((len(logits),), -77, device=logits.device))
    choose(logits, on_device(parameters, logits.device), target, has_limits=has_limits)
    return target.tokens_R


def expected(logits: Tensor, parameters: SamplingParameters) -> Tensor:
    target = TokenTarget.create(len(logits), CPU)
    choose_sampler(CPU).sample(logits.float().cpu(), parameters, target, has_limits=True)
    return target.tokens_R


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Rounding changes less than one token in a hundred."""
    assert (ours.cpu() != theirs).sum() <= max(1, len(theirs) // 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("R", "V"), [(1, 128256), (3, 8), (5, 49152), (300, 4096), (4, 151936), (2, 262144)])
def test_the_largest(R: int, V: int, dtype: torch.dtype, hopper: torch.device) -> None:
    for _ in range(5):
        logits = torch.randn(R, V, device=hopper).to(dtype)
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)  # the first of equals
        if R >= 3:
            logits[0, V - 1], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
            first[:3] = torch.tensor([NO_PLACE, NO_PLACE, NOTHING_LEFT])
        target = TokenTarget(torch.full((R,), -77, device=hopper))
        parameters = on_device(make_parameters([(0.0, 0, 1.0, 0.0)] * R, 0), hopper)
        choose(logits, parameters, target, has_limits=False)
        assert torch.equal(target.tokens_R, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [24, 300, 9000, 49152, 128256, 151936])
def test_draws_what_the_cpu_draws(V: int, dtype: torch.dtype, hopper: torch.device) -> None:
    cases = CASES * (8 if V < 100_000 else 2)
    for position in range(4):
        logits = (torch.randn(len(cases), V) * (1 + position)).to(dtype)
        logits[:, 3] = -torch.inf
        parameters = make_parameters(cases, position)
        assert_same(draw(logits.to(hopper), parameters), expected(logits, parameters))


@pytest.mark.parametrize("V", [24, 9000, 128256])
def test_draws_without_limits_what_the_cpu_draws(V: int, hopper: torch.device) -> None:
    cases = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.4, 0, 1.0, 0.0), (1e20, 0, 1.0, 0.0), (1e-6, 0, 1.0, 0.0)] * 10
    logits, parameters = torch.randn(len(cases), V) * 3, make_parameters(cases, 9)
    tokens = draw(logits.to(hopper), parameters, has_limits=False)
    assert_same(tokens, expected(logits, parameters))
    assert torch.equal(draw(logits.to(hopper), parameters), tokens)


def test_equal_logits_are_kept_together(hopper: torch.device) -> None:
    """All in one bin, or in few; and rows in which limits never bind."""
    cases = [
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.5, 0.0),
        (1.0, 5, 0.5, 0.0),
        (1.0, 9000, 0.999, 0.0),
        (1e-3, 60000, 0.9, 0.0),
    ]
    logits = torch.randint(0, 3, (len(cases) * 6, 49152)).float()
    logits[len(cases) : 2 * len(cases)] = 0.5
    logits[2 * len(cases) : 3 * len(cases), 10:] = -torch.inf
    logits[3 * len(cases) : 4 * len(cases)] *= 1e-7
    logits[4 * len(cases) : 5 * len(cases)] *= 1e30
    parameters = make_parameters(cases * 6, 2)
    assert_same(draw(logits.to(hopper), parameters), expected(logits, parameters))


def test_rows_that_are_not_finite_get_no_token(hopper: torch.device) -> None:
    logits = torch.randn(4, 500, device=hopper)
    logits[0, 499], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens = draw(logits, make_parameters([(1.0, 5, 0.9, 0.0)] * 4, 0)).tolist()
    assert tokens[:3] == [NO_PLACE, NO_PLACE, NOTHING_LEFT]
    assert tokens[3] >= 0


def test_newest_tokens_go_to_their_slots(hopper: torch.device) -> None:
    logits = torch.randn(3, 20, device=hopper)
    logits[1] = torch.nan
    newest = torch.full((6,), 9, dtype=torch.int32, device=hopper)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32, device=hopper)
    target = TokenTarget(torch.empty(3, dtype=torch.int64, device=hopper), slots, newest)
    first, _, last = logits.argmax(-1).tolist()
    parameters = on_device(make_parameters([(0.0, 0, 1.0, 0.0)] * 3, 0), hopper)
    HopperSampler(hopper).sample(logits, parameters, target, has_limits=True)
    assert target.tokens_R.tolist() == [first, NO_PLACE, last]
    assert newest.tolist() == [0, 9, last, 9, first, 9]


def test_follows_the_distribution(hopper: torch.device) -> None:
    rows, V = 40_000, 32
    logits = torch.randn(V, device=hopper)
    tokens = draw(
        logits.expand(rows, V).contiguous(), make_parameters([(0.8, 0, 1.0, 0.0)] * rows, 0), has_limits=False
    )
    share = torch.bincount(tokens, minlength=V).double() / rows
    exact = (logits.double() / 0.8).softmax(-1)
    assert ((share - exact).abs() < 5 * (exact * (1 - exact) / rows).sqrt() + 1e-9).all()


def test_full_size_repeats_its_tokens(hopper: torch.device) -> None:
    logits = torch.randn(256, 128256, device=hopper) * 2
    parameters = make_parameters(
        [(1.0, 50, 0.9, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 0, 0.95, 0.05)] * 64, 0
    )
    first = draw(logits, parameters)
    for _ in range(30):
        assert torch.equal(draw(logits, parameters), first)


def test_other_vocabularies_are_left_to_triton(hopper: torch.device) -> None:
    sampler, logits = HopperSampler(hopper), torch.randn(3, 301, device=hopper)
    target = TokenTarget.create(3, hopper)
    sampler.argmax(logits, target)
    assert torch.equal(target.tokens_R, logits.argmax(-1))
