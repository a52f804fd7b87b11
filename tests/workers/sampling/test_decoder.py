"""The decoder against a plain numpy implementation of each sampling parameter, and its guarantees about seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tensorweave.cluster.errors import LogitsNotFinite, RequestRejected, WorkerLost
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.pending import Ready, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.result import StepResult
from tests.workers.plain_sampling import chosen

VOCAB = 50


def request(spec: SamplingSpec, position: int = 5, order: int = 0) -> LlmRequest:
    made = LlmRequest(f"r{order}", order, [1] * position, 3, spec, state=RequestState.GENERATION)
    made.num_computed = made.num_launched = position - 1
    return made


def decodes(specs: Sequence[SamplingSpec], position: int = 5) -> ScheduledBatch:
    rows = (StepRow.of_decode(request(spec, position, i)) for i, spec in enumerate(specs))
    return ScheduledBatch(generation=tuple(rows))


def tokens_of(result: StepResult) -> list[int | None]:
    """None for a row that has none."""
    return [row[0] if isinstance(row, list) else None for row in result.rows]


def decode(logits: torch.Tensor, specs: list[SamplingSpec], position: int = 5) -> list[int | None]:
    return tokens_of(SamplingDecoder().decode(logits.clone(), decodes(specs, position)))


SPECS = [
    SamplingSpec(8),
    SamplingSpec(8, temperature=1.0, seed=3),
    SamplingSpec(8, temperature=0.3, seed=4),
    SamplingSpec(8, temperature=2.5, top_k=5, seed=5),
    SamplingSpec(8, temperature=1.0, top_k=1, seed=6),
    SamplingSpec(8, temperature=1.0, top_p=0.4, seed=7),
    SamplingSpec(8, temperature=1.0, top_p=1e-9, seed=7),
    SamplingSpec(8, temperature=1.5, min_p=0.2, seed=8),
    SamplingSpec(8, temperature=1.5, min_p=1.0, seed=8),
    SamplingSpec(8, temperature=0.9, top_k=20, top_p=0.8, min_p=0.02, seed=9),
    SamplingSpec(8, temperature=0.9, top_k=VOCAB + 7, seed=10),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_parameter_equals_its_definition(spec: SamplingSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    for position in range(4, 60):
        logits = torch.randn(1, VOCAB, generator=generator) * 3
        got = decode(logits, [spec], position)
        assert got == [chosen(logits[0].numpy(), spec, spec.top_p, position)]


def test_a_row_is_decoded_alike_whatever_stands_beside_it() -> None:
    logits = torch.randn(len(SPECS), VOCAB, generator=torch.Generator().manual_seed(2))
    together = decode(logits, SPECS)
    alone = [decode(logits[row : row + 1], [spec])[0] for row, spec in enumerate(SPECS)]
    assert together == alone


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    spec = [SamplingSpec(8, temperature=1.0, seed=seed) for seed in range(4000)]
    tokens = decode(logits.repeat(4000, 1), spec)
    shares = np.bincount(tokens, minlength=4) / 4000
    assert np.abs(shares - torch.softmax(logits[0], 0).numpy()).max() < 0.03


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 9.0
    logits[0, 8] = 5.0
    early = SamplingSpec(8, min_tokens=3, stop_token_ids=(7,))
    assert decode(logits, [early], position=5) == [8]  # two tokens are out
    assert decode(logits, [early], position=6) == [7]  # three are


def test_extreme_temperatures_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0]])
    for temperature in (1e-30, 1e-3, 1e30):
        token = decode(logits, [SamplingSpec(8, temperature=temperature, seed=1)])[0]
        assert 0 <= token < 4


# ---- logits that are not finite

PENALISED = SamplingSpec(8, repetition_penalty=1.3)
TOLD = SamplingSpec(8, temperature=0.8, seed=4, num_logprobs=2, wants_generation_logits=True)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("others", [SPECS[:1], SPECS[1:3], [PENALISED], [TOLD], [*SPECS, PENALISED, TOLD]], ids=len)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[9], PENALISED, TOLD], ids=str)
def test_a_row_that_is_not_finite_gives_no_token_and_harms_no_other(
    spec: SamplingSpec, others: list[SamplingSpec], wrong: float
) -> None:
    logits = torch.randn(len(others) + 1, VOCAB, generator=torch.Generator().manual_seed(5))
    expected = decode(logits[1:], others)
    logits[0] = wrong
    specs = [spec, *others]
    result = SamplingDecoder().decode(logits, decodes(specs))
    assert tokens_of(result) == [None, *expected]
    assert isinstance(result.rows[0], LogitsNotFinite)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], PENALISED, TOLD], ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_one_number_that_is_not_finite_is_enough(spec: SamplingSpec, wrong: float) -> None:
    for place in (0, 7, VOCAB - 1):
        logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
        logits[0, place] = wrong
        assert decode(logits, [spec]) == [None]


def test_tokens_that_the_model_itself_rules_out_are_no_fault() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 1:] = -torch.inf
    assert decode(logits, [SPECS[0], SPECS[1]]) == [0, 0]
    assert decode(logits, [PENALISED, TOLD]) == [0, 0]


def test_nobody_is_blamed_for_what_others_have_done() -> None:
    """A processor is not even asked where the model gave NaN; a penalty that leaves NaN is not a processor's fault."""
    calls: list[int] = []

    def mask(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: object, client: object) -> None:
        calls.append(req_id)
        logits[...] = torch.nan

    decoder = SamplingDecoder()
    decoder.processors.set("mask", mask)
    tiny = SamplingSpec(8, repetition_penalty=1e-50, min_tokens=8, stop_token_ids=(1,))  # minus infinity times 0
    specs = [SamplingSpec(8, logits_processors=("mask",))] * 2 + [tiny]
    logits = torch.zeros(3, VOCAB)
    logits[0] = torch.nan
    failures = decoder.decode(logits, decodes(specs)).rows
    assert calls == [1]
    assert isinstance(failures[0], LogitsNotFinite)
    blamed = [failure.param for failure in failures if isinstance(failure, RequestRejected)]
    assert blamed == ["logits_processor", "repetition_penalty"]


@pytest.mark.parametrize("num_rows", [0, 2])
def test_a_step_in_which_a_rank_took_no_part_gives_nothing(num_rows: int) -> None:
    """Also one of prompt chunks alone, whose keys and values would be offered to other gangs."""

    def check() -> None:
        raise WorkerLost("rank 1 is silent")

    step = StepLogits(torch.zeros(num_rows, VOCAB), check=check)
    pending = SamplingDecoder().launch(Ready(step), decodes([SamplingSpec(8)] * num_rows))
    with pytest.raises(WorkerLost, match="rank 1 is silent"):
        pending.result()
