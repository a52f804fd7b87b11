"""The decoder against a plain numpy statement of each sampling parameter, and its promises about seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.decoder import SamplingDecoder, uniform
from tensorweave.workers.plan import ScheduledBatch
from tensorweave.workers.request import LlmRequest, RequestState
from tests.workers.plain_sampling import chosen

VOCAB = 50


def request(spec: SamplingSpec, position: int = 5, order: int = 0) -> LlmRequest:
    made = LlmRequest(f"r{order}", order, [1] * position, 3, spec, state=RequestState.GENERATION)
    made.num_computed = position - 1
    return made


def decode(logits: torch.Tensor, specs: list[SamplingSpec], position: int = 5) -> list[int]:
    batch = ScheduledBatch(generation=tuple(request(spec, position, i) for i, spec in enumerate(specs)))
    return SamplingDecoder().decode(logits.clone(), batch).tokens


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
        assert got == [chosen(logits[0].numpy(), spec, spec.top_p, uniform(spec.seed, position))]


def test_a_row_is_decoded_alike_whatever_stands_beside_it() -> None:
    logits = torch.randn(len(SPECS), VOCAB, generator=torch.Generator().manual_seed(2))
    together = decode(logits, SPECS)
    alone = [decode(logits[row : row + 1], [spec])[0] for row, spec in enumerate(SPECS)]
    assert together == alone


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    spec = [SamplingSpec(8, temperature=1.0, seed=seed) for seed in range(4000)]
    batch = ScheduledBatch(generation=tuple(request(s, 5, i) for i, s in enumerate(spec)))
    tokens = SamplingDecoder().decode(logits.repeat(4000, 1), batch).tokens
    shares = np.bincount(tokens, minlength=4) / 4000
    assert np.abs(shares - torch.softmax(logits[0], 0).numpy()).max() < 0.03


def test_random_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    numbers = np.array([uniform(seed, position) for seed in range(60) for position in range(60)])
    assert len(np.unique(numbers)) == 3600
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, bins=10, range=(0, 1))[0] - 360).max() < 90


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
