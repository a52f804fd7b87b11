"""Both CPU forms of sampling against the rule in numpy; and the distribution of what they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tensorweave.kernels.argmax.reference import NO_PLACE, NOTHING_LEFT
from tensorweave.kernels.sample.chosen import Sampler, choose_sampler
from tensorweave.kernels.sample.native import NativeSampler
from tensorweave.kernels.sample.reference import ReferenceSampler, gumbel
from tensorweave.kernels.sample.rule import (
    GREATEST_TEMPERATURE,
    LEAST_TEMPERATURE,
    SamplingParameters,
    TokenTarget,
)
from tests.kernels.forms import CPU, needs_native
from tests.kernels.sample import plain_rule
from tests.kernels.sample.plain_rule import keys_of, limit_of, scores_of

FORMS = [pytest.param(ReferenceSampler(), id="reference"), pytest.param(choose_sampler(CPU), id="chosen")]
# Scores nearer to each other than this, in units of the temperature, may be ordered otherwise in float32.
SCORE_TOLERANCE = 1e-5
CASES = [  # temperature, top-k, top-p, min-p
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.3, 0.0),
    (2.5, 0, 0.9, 0.0), (0.7, 40, 0.8, 0.0), (1.0, 0, 1.0, 0.2), (1.3, 1000, 0.95, 0.01), (1.0, 1, 1.0, 0.0),
    (1.0, 3, 0.01, 0.5), (0.01, 50, 0.9, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 0, 1.0, 1.0),
    (LEAST_TEMPERATURE, 3, 0.9, 0.0), (GREATEST_TEMPERATURE, 7, 0.5, 0.0),
]  # fmt: skip
SEED_STEP = 12345678901


def make_parameters(cases: list[tuple[float, int, float, float]], position: int) -> SamplingParameters:
    temperature, top_k, top_p, min_p = zip(*cases, strict=True)
    rows = torch.arange(len(cases))
    return SamplingParameters(
        torch.tensor(temperature), torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p), torch.tensor(min_p),
        rows * SEED_STEP - 7, rows.int() + position,
    )  # fmt: skip


def draw(sampler: Sampler, logits: Tensor, parameters: SamplingParameters, has_limits: bool = True) -> Tensor:
    target = TokenTarget(torch.full((len(logits),), -77))
    sampler.sample(logits, parameters, target, has_limits=has_limits)
    return target.tokens_R


@needs_native
def test_the_native_form_is_chosen_on_a_cpu() -> None:
    assert isinstance(choose_sampler(CPU), NativeSampler)
    assert isinstance(choose_sampler(torch.device("meta")), ReferenceSampler)


@pytest.mark.parametrize("sampler", FORMS)
@pytest.mark.parametrize("V", [5, 300, 9001])
def test_equals_the_rule(V: int, sampler: Sampler) -> None:
    for position in range(10):
        logits = torch.randn(len(CASES), V) * 3
        logits[:, 3] = -torch.inf
        ours = draw(sampler, logits, make_parameters(CASES, position)).tolist()
        for row, (temperature, top_k, top_p, min_p) in enumerate(CASES):
            x = logits[row].numpy()
            if temperature == 0:
                assert ours[row] == x.argmax()
                continue
            scores = scores_of(x, temperature, row * SEED_STEP - 7, row + position)
            limit, keys = limit_of(x, temperature, top_k, top_p, min_p), keys_of(x, temperature)
            assert keys[ours[row]] <= limit + 1, (CASES[row], "a token that the limits forbid")
            assert scores[ours[row]] >= scores[keys <= limit].max() - SCORE_TOLERANCE * max(temperature, 1)


@pytest.mark.parametrize("V", [1, 15, 16, 17, 49152])
def test_both_forms_draw_the_same_tokens(V: int) -> None:
    logits = torch.randn(len(CASES), V) * 2
    for position in range(2 if V > 1000 else 20):
        parameters = make_parameters(CASES, position)
        native = draw(choose_sampler(CPU), logits, parameters)
        differ = draw(ReferenceSampler(), logits, parameters) != native
        assert differ.sum() <= 1, "more than rounding"


@pytest.mark.parametrize("sampler", FORMS)
def test_a_row_does_not_depend_on_the_batch(sampler: Sampler) -> None:
    logits = torch.randn(len(CASES), 500)
    together = draw(sampler, logits, make_parameters(CASES, 3))
    p = make_parameters(CASES, 3)
    for row in range(len(CASES)):
        numbers = (p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, p.seed_R, p.position_R)
        alone = SamplingParameters(*(each[row : row + 1] for each in numbers))
        assert draw(sampler, logits[row : row + 1], alone) == together[row]


@pytest.mark.parametrize("sampler", FORMS)
@pytest.mark.parametrize("case", [(1.0, 0, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (0.8, 3, 0.9, 0.0)], ids=str)
@pytest.mark.parametrize("V", [1, 15, 64, 100, 5000])
def test_a_row_that_is_not_finite_gets_no_token(
    V: int, case: tuple[float, int, float, float], sampler: Sampler
) -> None:
    x = torch.randn(6, V)
    x[0], x[1, V // 2], x[2, -1], x[3, 0], x[4] = torch.nan, torch.nan, torch.nan, torch.inf, -torch.inf
    tokens = draw(sampler, x, make_parameters([case] * 6, 0)).tolist()
    assert tokens[:5] == [NO_PLACE] * 4 + [NOTHING_LEFT]
    assert 0 <= tokens[5] < V


@pytest.mark.parametrize("sampler", FORMS)
def test_huge_numbers_and_temperatures_leave_a_token(sampler: Sampler) -> None:
    most = torch.finfo(torch.float32).max
    x = torch.tensor([[most, -most, 0.0, 1.0], [-most, -torch.inf, -most, -most], [1e4, -1e4, 0.0, 1.0]])
    for temperature in (LEAST_TEMPERATURE, 1.0, GREATEST_TEMPERATURE):
        for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
            tokens = draw(sampler, x, make_parameters([(temperature, top_k, top_p, 0.0)] * 3, 1)).tolist()
            assert tokens[0] == 0
            assert tokens[1] in (0, 2, 3)
            assert 0 <= tokens[2] < 4


@pytest.mark.parametrize("sampler", FORMS)
def test_newest_tokens_go_to_their_slots(sampler: Sampler) -> None:
    logits = torch.randn(3, 20)
    logits[1] = torch.nan
    newest = torch.full((6,), 9, dtype=torch.int32)
    target = TokenTarget(torch.empty(3, dtype=torch.int64), torch.tensor([4, 0, 2], dtype=torch.int32), newest)
    sampler.argmax(logits, target)
    first, _, last = logits.argmax(-1).tolist()
    assert target.tokens_R.tolist() == [first, NO_PLACE, last]
    assert newest.tolist() == [0, 9, last, 9, first, 9]
    sampler.sample(logits.roll(1, 0), make_parameters([(0.0, 0, 1.0, 0.0)] * 3, 0), target, has_limits=False)
    assert newest.tolist() == [first, 9, 0, 9, last, 9]


# ---- the distribution


@pytest.mark.parametrize("sampler", FORMS)
@pytest.mark.parametrize(
    ("case", "kept"), [((0.8, 0, 1.0, 0.0), 30), ((1.3, 4, 1.0, 0.0), 4), ((1.3, 9, 1.0, 0.0), 9)], ids=str
)
def test_follows_the_distribution(case: tuple[float, int, float, float], kept: int, sampler: Sampler) -> None:
    """40,000 draws over 30 tokens: each share within five standard deviations of softmax's."""
    rows, V = 40_000, 30
    logits = torch.randn(V)
    tokens = draw(sampler, logits.expand(rows, V).contiguous(), make_parameters([case] * rows, 0))
    share = torch.bincount(tokens, minlength=V).double() / rows
    exact = (logits.double() / case[0]).softmax(-1)
    exact[exact < exact.topk(kept).values[-1]] = 0
    exact /= exact.sum()
    assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / rows).sqrt()).all()


def test_random_numbers_are_uniform_and_independent_over_seeds_positions_and_tokens() -> None:
    """Shares of bins, and correlations of neighbours, within five standard deviations."""
    numbers = np.stack([[plain_rule.uniform(seed, position, 64) for position in range(30)] for seed in range(30)])
    count = numbers.size
    assert len(np.unique(numbers)) > count - 150, "more equal ones than 24 bits give"
    bins = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert np.abs(bins - count / 20).max() < 5 * (count / 20) ** 0.5
    for axis in range(3):
        left, right = np.take(numbers, range(1, 30), axis), np.take(numbers, range(29), axis)
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / left.size**0.5


def test_the_largest_and_the_smallest_random_numbers_are_numbers() -> None:
    g = gumbel(torch.arange(200), torch.zeros(200, dtype=torch.int32), 5000)
    assert g.isfinite().all()
    plain = torch.from_numpy(np.stack([plain_rule.gumbel(seed, 0, 5000) for seed in range(200)]))
    torch.testing.assert_close(g.double(), plain, atol=2e-6, rtol=2e-6)
