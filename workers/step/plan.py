"""What one step will compute: a frozen plan that schedulers return and everyone else only reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tensorweave.workers.step.request import LlmRequest


@dataclass(frozen=True, slots=True)
class ContextChunk:
    """Tokens [start, start + length) of a request's context are computed in this step."""

    request: LlmRequest
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """The chunk that ends the context: its last row gives the next token."""
        return self.start + self.length == self.request.context_len


@dataclass(frozen=True, slots=True)
class PromptRead:
    """Logits at prompt tokens [start, stop) of a request are told; the first is the batch's `row`-th token."""

    request: LlmRequest
    start: int
    stop: int
    row: int

    def split(self, num_rows: int) -> Iterator[PromptRead]:
        for start in range(self.start, self.stop, num_rows):
            stop = min(start + num_rows, self.stop)
            yield PromptRead(self.request, start, stop, self.row + start - self.start)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """Context chunks first, then one token for each generation request; `paused` give their KV back before the step.

    `fetching` get blocks for the rest of their context now and its KV from another gang; they compute nothing.
    """

    context: tuple[ContextChunk, ...] = ()
    generation: tuple[LlmRequest, ...] = ()
    paused: tuple[LlmRequest, ...] = ()
    fetching: tuple[ContextChunk, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing is computed."""
        return not (self.context or self.generation)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.context) + len(self.generation)

    @property
    def sampled(self) -> tuple[LlmRequest, ...]:
        """The requests that get a token, in the order of the logits' rows."""
        return tuple(chunk.request for chunk in self.context if chunk.is_last) + self.generation

    @property
    def prompt_reads(self) -> list[PromptRead]:
        """What of this step's prompt tokens is told for the first time, in the order of the batch."""
        reads: list[PromptRead] = []
        row = 0
        for chunk in self.context:
            request = chunk.request
            if request.num_rows_read < request.num_prompt_rows:
                start = max(chunk.start, request.num_rows_read)
                stop = min(chunk.start + chunk.length, request.num_prompt_rows)
                if start < stop:
                    reads.append(PromptRead(request, start, stop, row + start - chunk.start))
            row += chunk.length
        return reads
