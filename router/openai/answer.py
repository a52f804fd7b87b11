"""`Answer`: how one API writes the answer to one request, whole or streamed, as bytes.

`openai/answers.py` has it for completions and chats, `anthropic/answer.py` for messages, `responses/answer.py` for
responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.router.chat.parsed_choice import ParsedChunk
from tensorweave.router.openai.disaggregated import ContextPhase
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.openai.whole_choice import WholeChoice


class Answer(Protocol):
    """Used by one request."""

    def new_choice(self) -> WholeChoice:
        """One choice of a whole answer, still empty."""

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        """The whole answer; with `phase`, that of a context phase, which has one choice."""

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage) -> bytes:
        """The events before all text. `usage` is the prompt's alone."""

    async def event(self, chunk: ParsedChunk, usage: Callable[[], Usage]) -> bytes:
        """The events for one chunk; `usage` returns the usage so far."""

    def closing(self, usage: Usage) -> bytes:
        """The events after all chunks."""

    def failure(self, error: TensorweaveError) -> bytes:
        """The event that ends a stream with an error."""
