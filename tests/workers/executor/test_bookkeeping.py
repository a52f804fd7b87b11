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


def chunks_of(requests: list[LlmRequest], num_steps: int) -> list[list[tuple[int, list[int]]]]:
    """Decode steps in which token 100 + n is sampled; by request, where each chunk starts and its tokens."""
    told: dict[str, list[tuple[int, list[int]]]] = {request.request_id: [] for request in requests}
    for step in range(num_steps):
        batch = ScheduledBatch((), tuple(map(StepRow.of_decode, requests)))
        book_launch(batch)
        settled = book_result(batch, StepResult([[100 + step] for _ in requests]))
        assert settled.num_sampled == len(requests)
        for chunk in settled.chunks:
            told[chunk.request_id].append((chunk.start, list(chunk.token_ids)))
    return list(told.values())


def test_tokens_are_told_in_chunks_that_grow_to_what_was_asked_for() -> None:
    request = decoding(max_tokens=99, answer_every=8)
    (chunks,) = chunks_of([request], 40)
    assert [token for _, tokens in chunks for token in tokens] == list(range(100, 100 + 40 - request.num_held))
    assert [start for start, _ in chunks] == [1 + tokens[0] - 100 for _, tokens in chunks]
    assert [len(tokens) for _, tokens in chunks[:2]] == [2, 4]
    assert {len(tokens) for _, tokens in chunks[3:]} == {8}
    num_held = request.num_held
    assert list(request.tell().token_ids) == list(range(140 - num_held, 140))


def test_requests_tell_in_different_steps() -> None:
    requests = []
    for order in range(8):
        request = LlmRequest(f"r{order}", order, [1], 1, SamplingSpec(99), answer_every=8)
        batch = ScheduledBatch((StepRow.of_context(request, 0, 1),))
        book_launch(batch)
        assert len(book_result(batch, StepResult([[6]])).chunks) == 1, "the first token is told at once"
        requests.append(request)
    last_starts = sorted(chunks[-1][0] + len(chunks[-1][1]) for chunks in chunks_of(requests, 40))
    assert last_starts == list(range(34, 42))


def test_the_end_tells_what_was_held() -> None:
    request = decoding(max_tokens=5, answer_every=32)
    (chunks,) = chunks_of([request], 4)
    assert [tokens for _, tokens in chunks] == [[100, 101], [102, 103]]
    assert request.finish_reason == "length"


def test_an_error_comes_behind_what_was_held() -> None:
    request = decoding(answer_every=32)
    assert chunks_of([request], 1) == [[]]
    batch = ScheduledBatch((), (StepRow.of_decode(request),))
    book_launch(batch)
    held, failed = book_result(batch, StepResult([LogitsNotFinite.of_model()])).chunks
    assert (held.start, held.token_ids, held.is_last) == (1, [100], False)
    assert (failed.start, list(failed.token_ids)) == (2, [])
    assert isinstance(failed.error, LogitsNotFinite)


def test_no_token_is_held_that_more_is_told_of() -> None:
    request = decoding(answer_every=32, num_logprobs=0)
    assert len(chunks_of([request], 3)[0]) == 3


def test_several_tokens_at_once_are_held_too() -> None:
    request = decoding(answer_every=8, stop_token_ids=(9,))
    batch = ScheduledBatch((), (StepRow(request, 5, 5, 5),))
    book_launch(batch)
    settled = book_result(batch, StepResult([[7, 8, 9, 10]]))
    assert [list(chunk.token_ids) for chunk in settled.chunks] == [[7, 8, 9]]
    assert (settled.truncated, request.num_computed, request.num_launched) == ([request], 8, 8)
