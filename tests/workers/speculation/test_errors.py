"""Requests that end with an error end with the same one, after the same tokens, whatever was drafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.fakes.fake_engine import HashEngine, hash_token
from tests.workers.speculation.drafted_run import DraftedRun, tokens_of, told, user_config

VOCAB = 97


class FailingEngine(HashEngine):
    """After contexts of `fails_at` tokens, the logits are not finite."""

    def __init__(self, fails_at: int) -> None:
        super().__init__(VOCAB, 100, 16)
        self._fails_at = fails_at

    def logits_after(self, context: list[int]) -> Tensor:
        logits_V = super().logits_after(context)
        return torch.full_like(logits_V, torch.nan) if len(context) == self._fails_at else logits_V


def right(_: int, tokens: Sequence[int], most: int) -> Sequence[int]:
    drafted = list(tokens)
    for _ in range(most):
        drafted.append(hash_token(drafted, VOCAB))
    return drafted[len(tokens) :]


def answers_of(engine: Any, config: Any, requests: Sequence[GenerateRequest], processor: Any = None) -> Any:
    run = DraftedRun(engine, config)
    run.executor.set_logits_processor("mine", processor)
    answers = run.answer(requests)
    run.close()
    return run, answers


@pytest.mark.parametrize("fails_at", range(8, 24))
def test_logits_that_are_not_finite(fails_at: int) -> None:
    """At a decode, or at a sample behind a draft; another request goes on."""
    requests = [GenerateRequest("fails", [3] * 8, SamplingSpec(20)), GenerateRequest("ends", [4] * 4, SamplingSpec(3))]
    _, want = answers_of(FailingEngine(fails_at), None, requests)
    run, got = answers_of(FailingEngine(fails_at), user_config(right), requests)
    assert {name: told(chunks) for name, chunks in got.items()} == {name: told(c) for name, c in want.items()}
    assert isinstance(got["fails"][-1].error, LogitsNotFinite)
    assert len(tokens_of(got["fails"])) == fails_at - 8
    assert run.executor.gauges()["requests_not_finite_total"] == 1


@pytest.mark.parametrize("fails_at", range(8, 24))
def test_a_users_processor_that_raises(fails_at: int) -> None:
    def processor(req_id: int, logits: Any, token_ids: list[list[int]], *others: Any) -> None:
        if len(token_ids[0]) == fails_at:
            raise RuntimeError("enough")

    requests = [GenerateRequest("r", [3] * 8, SamplingSpec(20, logits_processors=("mine",)))]
    _, want = answers_of(HashEngine(VOCAB, 100, 16), None, requests, processor)
    _, got = answers_of(HashEngine(VOCAB, 100, 16), user_config(right), requests, processor)
    assert told(got["r"]) == told(want["r"])
    assert "enough" in str(got["r"][-1].error)
    assert len(tokens_of(got["r"])) == fails_at - 8
