"""`ParsedChoice`: the chunks of one choice, its text parsed to content, reasoning and calls of tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from tensorweave.cluster.protocol import FinishReason
from tensorweave.router.chat_formats.deltas import CallStart, Content, Delta, Reasoning
from tensorweave.router.text.choices import ChoiceChunk, ChoiceStream
from tensorweave.router.text.generation import TextDelta

AnswerEnd = FinishReason | Literal["tool_calls"]


class Parser(Protocol):
    """The parser of one answer's text."""

    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class PlainText:
    """All text is content."""

    def feed(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


PLAIN_TEXT: Final = PlainText()


@dataclass(slots=True)
class ParsedChunk:
    """A part of a choice. `piece` has its text as the model wrote it, and its tokens.

    Like `TextDelta` it is not frozen, because there is one per token."""

    piece: ChoiceChunk
    deltas: Sequence[Delta]
    finish_reason: AnswerEnd | None = None


class ParsedChoice:
    """One per sequence. `add` takes every delta and returns a chunk if there is something to send.

    Args:
        stream: Text and tokens of the choice.
        parser: Of its text.
        shows_reasoning: False: reasoning is left out.
    """

    def __init__(self, stream: ChoiceStream, parser: Parser = PLAIN_TEXT, *, shows_reasoning: bool = True) -> None:
        self._stream = stream
        self._parser = parser
        self._shows_reasoning = shows_reasoning
        self._has_called = False
        self._held: list[ChoiceChunk] = []
        self._num_undecided = 0
        self.num_reasoning_tokens = 0
        """Tokens of the reasoning, with the mark that opens it."""

    @property
    def mean_logprob(self) -> float:
        return self._stream.mean_logprob

    def add(self, delta: TextDelta) -> ParsedChunk | None:
        piece = self._stream.add(delta)
        self._num_undecided += delta.num_tokens
        if piece is None:
            return None
        deltas = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            deltas += self._parser.finish()
        deltas = self._counted(deltas)
        if not deltas and piece.finish_reason is None:
            self._held.append(piece)  # it is sent with the next text
            return None
        if self._held:
            tokens = [token for held in self._held for token in held.tokens]
            prompt = self._held[0].prompt or piece.prompt
            piece = dataclasses.replace(piece, tokens=[*tokens, *piece.tokens], prompt=prompt)
            self._held = []
        return ParsedChunk(piece, deltas, self._ending(piece))

    def _counted(self, deltas: list[Delta]) -> list[Delta]:
        if not deltas:
            return deltas
        kinds = {type(delta) for delta in deltas}
        if Reasoning in kinds:
            self.num_reasoning_tokens += self._num_undecided
            if not self._shows_reasoning:
                deltas = [delta for delta in deltas if not isinstance(delta, Reasoning)]
        self._num_undecided = 0
        if CallStart in kinds:
            self._has_called = True
        return deltas

    def _ending(self, piece: ChoiceChunk) -> AnswerEnd | None:
        return "tool_calls" if self._has_called and piece.finish_reason == "stop" else piece.finish_reason
