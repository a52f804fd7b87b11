"""From a sequence's tokens to its text: dispatch and detokenization combined; several sequences in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from tensorweave.cluster.errors import raised_by_user
from tensorweave.cluster.protocol import FinishReason, GenerateRequest, Ticket, TokenChunk, TokenLogprobs
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.fair_queue import NO_KEY
from tensorweave.router.dispatch.timeline import Timeline
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.event_pace import EventPace


class TokensOnly:
    """A detokenizer for requests that need no text."""

    has_stop_strings = False
    stop_reason = None

    def push(self, token_ids: Sequence[int], *, ends_with_stop_token: bool = False) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence of a request, ready to run. `index` is its index in the answer's choices.

    `first_tokens` are from a context phase: the answer starts with them, and the request's `fetch` continues them.
    `key` is the name of the client's API key.
    """

    index: int
    request: GenerateRequest
    detokenizer: IncrementalDetokenizer | TokensOnly
    end_ids: frozenset[int]
    session: str | None = None
    first_tokens: Sequence[int] = ()
    timeline: Timeline = field(default_factory=Timeline)
    key: str = NO_KEY


@dataclass(slots=True)
class TextDelta:
    """What one step added to one sequence. `text` is empty while a character or a possible stop string is incomplete.
    Like `TokenChunk` it is not frozen, because there is one per token.

    `stop_reason` is the stop string or the requested stop token that ended it; None for the model's own end token.
    Log-probabilities and logits are as in `TokenChunk`.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    num_cached_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    logits: bytes = field(default=b"", repr=False)
    context_logits: bytes = field(default=b"", repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


async def generate_text(
    dispatcher: Dispatcher, job: Job, pace: EventPace | None = None
) -> AsyncGenerator[TextDelta, None]:
    """Deltas until the one with a finish reason. A stop string ends the sequence here, which cancels it at the gang.
    Without `pace` there is one for each chunk of the gang."""
    stream = dispatcher.generate(
        job.request, key=job.key, session=job.session, first_tokens=job.first_tokens, timeline=job.timeline
    )
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            delta = _text_safely_of(job, chunk)
            yield delta
            if delta.finish_reason is not None:
                return
            if pace is not None and _can_be_joined(chunk) and (wait_s := pace.wait_s()):
                await asyncio.sleep(wait_s)


def _can_be_joined(chunk: TokenChunk) -> bool:
    """Whether later chunks of the sequence are handed over as one if they wait. Those with log-probabilities or logits
    are not, and whoever waited between them would fall behind."""
    return not (chunk.logprobs or chunk.logits or chunk.context_logits)


async def generate_first(dispatcher: Dispatcher, job: Job) -> tuple[TextDelta, Ticket | None]:
    """Run a context phase: the first token's text, and the ticket for the generation phase unless the sequence
    ended."""
    handoff = await dispatcher.prefill(job.request, job.timeline, key=job.key)
    delta = _text_safely_of(job, handoff.chunk)
    return delta, handoff.ticket if delta.finish_reason == "not_finished" else None


def _text_safely_of(job: Job, chunk: TokenChunk) -> TextDelta:
    try:
        return _text_of(job, chunk)
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:  # raised by a user's tokenizer
        raise raised_by_user(error) from error


def _text_of(job: Job, chunk: TokenChunk) -> TextDelta:
    detokenizer = job.detokenizer
    text, num_tokens = _push(detokenizer, chunk)
    finish_reason = chunk.finish_reason
    stop_reason: int | str | None = None if chunk.stop_reason in job.end_ids else chunk.stop_reason
    if finish_reason is not None:
        text += detokenizer.flush()
    if detokenizer.stop_reason is not None:
        finish_reason, stop_reason = "stop", detokenizer.stop_reason
    token_ids, logprobs, logits = chunk.token_ids, chunk.logprobs, chunk.logits
    if num_tokens < len(token_ids):
        logits = logits[: len(logits) // len(token_ids) * num_tokens]
        token_ids, logprobs = token_ids[:num_tokens], logprobs[:num_tokens]
    return TextDelta(
        job.index,
        text,
        token_ids,
        chunk.num_cached_tokens,
        finish_reason,
        stop_reason,
        logprobs,
        chunk.prompt_logprobs,
        logits,
        chunk.context_logits,
    )


def _push(detokenizer: IncrementalDetokenizer | TokensOnly, chunk: TokenChunk) -> tuple[str, int]:
    """The text, and how many of the tokens belong to the answer: a stop string may end it before the last one."""
    token_ids, ends_with_stop_token = chunk.token_ids, chunk.stop_reason is not None
    if len(token_ids) < 2 or not detokenizer.has_stop_strings:
        return detokenizer.push(token_ids, ends_with_stop_token=ends_with_stop_token), len(token_ids)
    text = ""
    for place, token_id in enumerate(token_ids, start=1):
        is_last = place == len(token_ids)
        text += detokenizer.push((token_id,), ends_with_stop_token=ends_with_stop_token and is_last)
        if detokenizer.stop_reason is not None:
            return text, place
    return text, len(token_ids)


def generate_all(
    dispatcher: Dispatcher, jobs: Sequence[Job], pace: EventPace | None = None
) -> AsyncGenerator[TextDelta, None]:
    """The deltas of all jobs as they come. The first error, or closing the generator, cancels the rest."""
    return generate_text(dispatcher, jobs[0], pace) if len(jobs) == 1 else _generate_merged(dispatcher, jobs, pace)


async def _generate_merged(
    dispatcher: Dispatcher, jobs: Sequence[Job], pace: EventPace | None
) -> AsyncGenerator[TextDelta, None]:
    merged: asyncio.Queue[TextDelta | asyncio.Task[None]] = asyncio.Queue()

    async def pump(job: Job) -> None:
        async with aclosing(generate_text(dispatcher, job, pace)) as deltas:
            async for delta in deltas:
                merged.put_nowait(delta)

    tasks: list[asyncio.Task[None]] = []
    try:
        for job in jobs:
            task = asyncio.create_task(pump(job))
            task.add_done_callback(merged.put_nowait)
            tasks.append(task)
            await asyncio.sleep(0)  # sending a long prompt takes a millisecond, and there may be hundreds
        num_open = len(jobs)
        while num_open:
            item = await merged.get()
            if isinstance(item, TextDelta):
                yield item
            else:
                num_open -= 1
                item.result()  # raises the task's error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
