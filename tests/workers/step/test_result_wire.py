"""A step's result arrives at the other stages as it was sent."""

from __future__ import annotations

import math

import pytest

from tensorweave.cluster.errors import LogitsNotFinite, RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import Logprob, SamplingSpec
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.result import PromptResult, StepResult
from tensorweave.workers.step.result_wire import pack_result, unpack_result


@pytest.fixture
def batch() -> ScheduledBatch:
    requests = [LlmRequest(f"r{i}", i, [1, 2, 3], 3, SamplingSpec(5)) for i in range(4)]
    return ScheduledBatch(tuple(StepRow.of_context(request, 0, 3) for request in requests))


def plain(error: TensorweaveError | None) -> object:
    return None if error is None else (type(error), error.message, error.param)


def test_everything_in_it_arrives(batch: ScheduledBatch) -> None:
    logprobs = (Logprob(7, -0.25, 1), Logprob(9, -math.inf, 2))
    refused = RequestRejected("no token is left", param="guide")
    result = StepResult(
        [[5], [6], refused, LogitsNotFinite.of_model()],
        {0: (TokenExtras(logprobs, b"\0\1"),), 1: (TokenExtras(None, b"abcd"),)},
        [
            PromptResult(PromptRead(batch.context[2].request, 0, 2, 6), [logprobs], [b"12345678"]),
            PromptResult(PromptRead(batch.context[3].request, 1, 2, 9), failure=LogitsNotFinite.of_model()),
        ],
    )
    got = unpack_result(pack_result(result), batch)
    assert got.rows[:2] == [[5], [6]]
    assert [plain(row) for row in got.rows[2:]] == [plain(row) for row in result.rows[2:]]  # type: ignore[arg-type]
    assert {place: tuple(tokens) for place, tokens in got.extras.items()} == result.extras
    for prompt, want in zip(got.prompts, result.prompts, strict=True):
        assert prompt.read == want.read
        assert prompt.read.request is want.read.request
        assert (list(prompt.logprobs), list(prompt.logits)) == (list(want.logprobs), list(want.logits))
        assert plain(prompt.failure) == plain(want.failure)


def test_a_step_that_samples_nothing(batch: ScheduledBatch) -> None:
    got = unpack_result(pack_result(StepResult()), batch)
    assert (list(got.rows), dict(got.extras), list(got.prompts)) == ([], {}, [])
