"""Penalties by counts against loops over the tokens of each row."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.penalties import reference
from tensorweave.kernels.penalties.chosen import PenaltyOperations, choose_penalties
from tensorweave.kernels.penalties.reference import MOST, PROMPT, PenalisedRows

V = 5000


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.gpu)])
def operations(request: pytest.FixtureRequest) -> PenaltyOperations:
    if request.param == "reference":
        return choose_penalties(torch.device("cpu"))
    pytest.importorskip("triton")
    request.getfixturevalue("device")
    from tensorweave.kernels.penalties import triton

    return PenaltyOperations(triton.penalise, triton.count)


def place_of(operations: PenaltyOperations) -> torch.device:
    on_cuda = operations.penalise is not reference.penalise and torch.cuda.is_available()
    return torch.device("cuda" if on_cuda else "cpu")


def make_rows(penalties: list[tuple[float, float, float]], device: torch.device) -> PenalisedRows:
    repetition, presence, frequency = torch.tensor(penalties, device=device).t().contiguous()
    count = len(penalties)
    rows = torch.arange(count, dtype=torch.int32, device=device) * 2
    return PenalisedRows(
        rows, count - 1 - torch.arange(count, dtype=torch.int32, device=device), repetition, presence, frequency
    )


def defined(logit: float, count: int, penalties: tuple[float, float, float]) -> float:
    repetition, presence, frequency = penalties
    if not count:
        return logit
    new = logit / repetition if logit > 0 else logit * repetition
    return new - (presence if count >> 1 else 0) - frequency * (count >> 1)


PENALTIES = [(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.7, 0.5, -0.2), (1.0, 0.9, 0.4), (5.0, -2.0, 2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties_are_their_definition(dtype: torch.dtype, operations: PenaltyOperations) -> None:
    device, rng = place_of(operations), random.Random(3)
    rows = make_rows(PENALTIES, device)
    counts = torch.zeros(len(PENALTIES), V, dtype=torch.int16)
    for place in range(len(PENALTIES)):
        for token in rng.sample(range(V), 400):
            counts[place, token] = rng.choice([PROMPT, 2, 3, 8, 9])
    logits = (torch.randn(2 * len(PENALTIES), V) * 3).to(dtype)
    logits[:, 17] = -torch.inf
    ours = logits.to(device, copy=True)
    operations.penalise(ours, counts.to(device), rows)
    assert torch.equal(ours.cpu()[1::2], logits[1::2]), "rows that are not penalised"
    for n, penalties in enumerate(PENALTIES):
        plain = [float(x) for x in logits[2 * n]]
        taken = counts[len(PENALTIES) - 1 - n].tolist()
        expected = torch.tensor(
            [defined(x, c, penalties) for x, c in zip(plain, taken, strict=True)], dtype=torch.float64
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[2 * n].double().cpu(), expected, atol=tolerance, rtol=tolerance)


def test_no_number_becomes_plus_infinity_and_nan_stays(operations: PenaltyOperations) -> None:
    device = place_of(operations)
    rows = make_rows([(1e-30, 0.0, 0.0), (1.0, -2.0, 0.0)], device)
    counts = torch.full((2, V), 2, dtype=torch.int16, device=device)
    logits = torch.full((3, V), 1e30, device=device)
    logits[0, 7] = torch.nan
    logits[2] = torch.finfo(torch.float32).max
    operations.penalise(logits, counts, rows)
    assert logits[0].isnan().sum() == 1
    assert not logits.isinf().any()


def test_drawn_tokens_are_counted(operations: PenaltyOperations) -> None:
    device = place_of(operations)
    rows = make_rows(PENALTIES[:3], device)
    counts = torch.zeros(3, V, dtype=torch.int16, device=device)
    counts[2, 5], counts[0, 6] = PROMPT, MOST - 1
    tokens: Tensor = torch.tensor([5, 1, -1, 1, 6], device=device)
    for _ in range(2):
        operations.count(tokens, counts, rows)
    assert counts[2, 5] == PROMPT + 4
    assert counts[1, 0] == 4
    assert counts[0, 6] == MOST
    assert (counts != 0).sum() == 3
