"""What one step will compute: a frozen plan that schedulers return and everyone else only reads."""

from __future__ import annotations

from dataclasses import dataclass

from tensorweave.workers.request import LlmRequest


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
