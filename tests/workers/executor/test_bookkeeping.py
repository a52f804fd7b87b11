"""What a step changes on its requests, worked by hand: rows of several tokens, ends inside a row, late rows."""

from __future__ import annotations

from typing import Any

from tensorweave.cluster.errors import LogitsNotFinite
from tensorweave.cluster.protocol import Logprob, SamplingSpec
from tensorweave.workers.executor.bookkeeping import book_launch, book_result, checksum
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState, TokenExtras
from tensorweave.workers.step.result import StepResult

PROMPT = [1, 2, 3, 4, 5]


def decoding(max_tokens: int = 20, **fields: Any) -> LlmRequest:
    """Its context is computed, and token 6 is its first."""
    spec = {key: fields.pop(key) for key in ("stop_token_ids", "min_tokens", "num_logprobs") if key in fields}
    request = LlmRequest("r", 1, list(PROMPT), len(PROMPT), SamplingSpec(max_tokens, **spec), **fields)
    batch = ScheduledBatch((StepRow.of_context(request, 0, 5),))
    book_launch(batch)
    book_result(batch, StepResult([[6]]))
    return request


def test_what_is_launched_and_what_has_settled_are_told_apart() -> None:
    request = LlmRequest("r", 1, list(PROMPT), len(PROMPT), SamplingSpec(9))
    first, last = (ScheduledBatch((StepRow.of_context(request, start, n),)) for start, n in ((0, 3), (3, 2)))
    book_launch(first)
    assert (request.state, request.num_launched, request.num_computed) == (RequestState.CONTEXT, 3, 0)
    assert (request.num_tokens, request.num_pending) == (5, 0)
    book_launch(last)
    assert (request.state, request.num_launched, request.num_computed) == (RequestState.GENERATION, 5, 0)
    assert (request.num_tokens, request.num_pending) == (6, 1)
    decode = ScheduledBatch((), (StepRow.of_decode(request),))
    assert decode.sampled == (StepRow(request, 5, 1, 1),)
    book_result(first, StepResult())
    assert (request.num_computed, request.tokens) == (3, PROMPT)
    book_result(last, StepResult([[6]]))
    assert (request.num_computed, request.tokens, request.num_pending) == (5, [*PROMPT, 6], 0)


def test_a_plan_stays_as_it_was_made() -> None:
    request = decoding()
    batch = ScheduledBatch((), (StepRow.of_decode(request),))
    book_launch(batch)
    book_result(batch, StepResult([[7]]))
    request.pause()
    assert batch.sampled == (StepRow(request, 5, 1, 1),)


def test_several_tokens_come_at_once() -> None:
    request = decoding(num_logprobs=0)
    batch = ScheduledBatch((), (StepRow(request, 5, 3, 3),))
    book_launch(batch)
    extras = [TokenExtras((Logprob(token, -1.0, 1),)) for token in (7, 8, 9)]
    settled = book_result(batch, StepResult([[7, 8, 9]], {0: extras}))
    (chunk,) = settled.chunks
    assert (list(chunk.token_ids), chunk.start, chunk.finish_reason) == ([7, 8, 9], 1, None)
    assert [logprobs[0].token_id for logprobs in chunk.logprobs] == [7, 8, 9]
    assert (request.tokens, request.num_computed, settled.truncated) == ([*PROMPT, 6, 7, 8, 9], 8, [])


def test_a_stop_token_inside_a_row_ends_there() -> None:
    request = decoding(stop_token_ids=(8,), num_logprobs=0)
    batch = ScheduledBatch((), (StepRow(request, 5, 4, 4),))
    book_launch(batch)
    extras = [TokenExtras((Logprob(token, -1.0, 1),)) for token in (7, 8, 9, 10)]
    settled = book_result(batch, StepResult([[7, 8, 9, 10]], {0: extras}))
    (chunk,) = settled.chunks
    assert (list(chunk.token_ids), chunk.finish_reason, chunk.stop_reason, len(chunk.logprobs)) == (
        [7, 8],
        "stop",
        8,
        2,
    )
    assert (request.tokens, request.num_computed, request.num_launched) == ([*PROMPT, 6, 7, 8], 7, 7)
    assert (settled.ended, settled.truncated) == ([request], [request])


def test_the_limit_inside_a_row_ends_there() -> None:
    request = decoding(max_tokens=3)
    batch = ScheduledBatch((), (StepRow(request, 5, 4, 4),))
    assert not book_launch(batch), "only one of its tokens is certain"
    settled = book_result(batch, StepResult([[7, 8, 9, 10]]))
    assert (list(settled.chunks[0].token_ids), settled.chunks[0].finish_reason) == ([7, 8], "length")


def test_min_tokens_holds_a_stop_off_inside_a_row() -> None:
    request = decoding(stop_token_ids=(7, 8), min_tokens=3)
    batch = ScheduledBatch((), (StepRow(request, 5, 3, 3),))
    book_launch(batch)
    assert list(book_result(batch, StepResult([[7, 8, 9]])).chunks[0].token_ids) == [7, 8]


def test_ends_that_are_known_are_booked_at_the_launch() -> None:
    ending, going, offered = decoding(max_tokens=2), decoding(max_tokens=3), decoding()
    offered.offer, offered.closes_at = "ticket", 0
    batch = ScheduledBatch((), tuple(map(StepRow.of_decode, (ending, going, offered))))
    assert book_launch(batch)
    states = [request.state for request in (ending, going, offered)]
    assert states == [RequestState.CLOSING, RequestState.GENERATION, RequestState.CLOSING]
    settled = book_result(batch, StepResult([[7], [7], [7]]))
    assert [request.finish_reason for request in settled.ended] == ["length", "not_finished"]


def test_a_row_of_a_request_that_has_ended_is_dropped() -> None:
    request = decoding()
    batch = ScheduledBatch((), (StepRow.of_decode(request),))
    book_launch(batch)
    request.finish_reason, request.state = "cancelled", RequestState.DONE
    settled = book_result(batch, StepResult([[7]]))
    assert (settled.chunks, settled.ended, settled.num_sampled) == ([], [], 0)
    assert (request.tokens, request.num_computed) == ([*PROMPT, 6], 5)


def test_an_error_takes_the_place_of_the_token() -> None:
    request = decoding()
    batch = ScheduledBatch((), (StepRow.of_decode(request),))
    book_launch(batch)
    settled = book_result(batch, StepResult([LogitsNotFinite.of_model()]))
    (chunk,) = settled.chunks
    assert isinstance(chunk.error, LogitsNotFinite)
    assert (list(chunk.token_ids), chunk.start, request.tokens) == ([], 1, [*PROMPT, 6])
    assert settled.ended == [request]


def test_the_checksum_is_of_the_tokens_alone() -> None:
    whole = checksum(StepResult([[1, 2], [3]]), 0)
    assert whole == checksum(StepResult([[3]]), checksum(StepResult([[1, 2], LogitsNotFinite.of_model()]), 0))
    assert whole != checksum(StepResult([[1], [3]]), 0)
