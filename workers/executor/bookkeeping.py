"""What a step changes on its requests: `book_launch` when it is launched, `book_result` when it settles.

Shared by the executor and `DryRun`. Nothing here knows of KV blocks or sends answers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from tensorweave.cluster.protocol import TokenChunk, pack_tokens
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.result import PromptResult, RowResult, StepResult

_DONE = RequestState.DONE


def book_launch(batch: ScheduledBatch) -> bool:
    """Book what is certain when a step is launched: how far each request's KV will be computed, and that each sampled
    row will have a token. Return whether a request has become CLOSING."""
    for request, start, length, num_samples in batch.context:
        if request.state is RequestState.WAITING:
            request.num_computed = start
        request.num_launched = start + length
        request.state = RequestState.GENERATION if num_samples else RequestState.CONTEXT
    is_closing = False
    for request, start, length, num_samples in batch.sampled:
        request.num_launched = stop = start + length
        if stop - num_samples >= request.closes_at - 1:
            request.state = RequestState.CLOSING
            is_closing = True
    return is_closing


@dataclass(slots=True)
class Settled:
    """What a step that has settled leads to.

    `context` are its chunks whose KV is right, `ended` the requests that end with it, `truncated` those that did not
    take all tokens of their row, and `chunks` is what to tell now. `num_sampled` counts the rows that were not dropped.
    """

    context: list[StepRow]
    ended: list[LlmRequest]
    truncated: list[LlmRequest]
    chunks: list[TokenChunk]
    num_sampled: int


def book_result(batch: ScheduledBatch, result: StepResult) -> Settled:
    """Book what a step has computed. Rows of requests that have ended since its launch are dropped."""
    settled = Settled([], [], [], [], 0)
    for prompt in result.prompts:
        _book_prompt(prompt, settled)
    for row in batch.context:
        if not row.num_samples and row.request.state is not _DONE:
            row.request.num_computed = row.stop
    _book_rows(batch, result, settled)
    for row in batch.context:
        if row.request.state is not _DONE and row.request.failure is None:
            settled.context.append(row)
    return settled


def checksum(result: StepResult, before: int) -> int:
    """Return the checksum of all tokens sampled so far, given that of the tokens before this step."""
    tokens: list[int] = []
    for outcome in result.rows:
        if isinstance(outcome, list):
            tokens += outcome
    return zlib.crc32(pack_tokens(tokens), before)


def _book_rows(batch: ScheduledBatch, result: StepResult, settled: Settled) -> None:
    chunks, extras = settled.chunks, result.extras
    num_sampled = 0
    for place, row, outcome in zip(range(len(result.rows)), batch.sampled, result.rows, strict=True):
        request, start, length, num_samples = row
        if request.state is _DONE:
            continue
        num_sampled += 1
        if isinstance(outcome, list) and request.failure is None:
            num_tokens = len(request.tokens)
            chunk = request.take_tokens(outcome, extras.get(place, ()) if extras else ())
            request.num_computed = start + length
            if num_samples > 1:
                _reject(request, num_tokens + num_samples - len(request.tokens), settled)
            if chunk is not None:
                chunks.append(chunk)
        else:
            _fail(request, outcome, chunks)
        if request.finish_reason is not None:
            settled.ended.append(request)
    settled.num_sampled = num_sampled


def _reject(request: LlmRequest, num_rejected: int, settled: Settled) -> None:
    if num_rejected:
        request.num_computed -= num_rejected
        request.num_launched = request.num_computed
        settled.truncated.append(request)


def _fail(request: LlmRequest, outcome: RowResult, chunks: list[TokenChunk]) -> None:
    failure = request.failure
    if failure is None:
        assert not isinstance(outcome, list)
        failure = outcome
    if request.num_held:
        chunks.append(request.tell())
    chunks.append(request.fail(failure))


def _book_prompt(prompt: PromptResult, settled: Settled) -> None:
    request = prompt.read.request
    if request.state is _DONE:
        return
    request.num_rows_read = prompt.read.stop
    request.failure = request.failure or prompt.failure
    if request.failure is not None:
        return
    if request.prompt_logprobs is not None:
        request.prompt_logprobs += prompt.logprobs
    for logits in prompt.logits:
        settled.chunks.append(TokenChunk(request.request_id, start=request.num_output, context_logits=logits))
