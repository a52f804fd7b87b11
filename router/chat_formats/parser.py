"""`AnswerParser`: an answer's text, piece by piece, to deltas of content, reasoning and calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.deltas import Delta
from tensorweave.router.chat_formats.source import Markers, NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import JsonForm, TagFormat
from tensorweave.router.chat_formats.thinking import Thinking, ThinkingState
from tensorweave.router.chat_formats.tools import OfferedTools


class AnswerParser:
    """Parses one answer. The deltas of all calls together are the same for all cuts of the text into pieces.

    Text is held back only while it may be part of a marker, of the beginning of a call or of white space before one.
    Whatever is not a call comes back as content.
    """

    def __init__(self, source: Source, answer: Answer, steps: Step[None]) -> None:
        self._source = source
        self._answer = answer
        self._steps: Step[None] | None = steps

    def feed(self, text: str) -> list[Delta]:
        """The deltas that the next piece of the text completes."""
        self._source.push(text)
        return self._advance()

    def finish(self) -> list[Delta]:
        """The remaining deltas; the text has ended, perhaps in the middle of a call."""
        self._source.end()
        self._advance_steps()
        self._answer.finish()
        return self._answer.take()

    def _advance(self) -> list[Delta]:
        self._advance_steps()
        return self._answer.take()

    def _advance_steps(self) -> None:
        if self._steps is not None and next(self._steps, self) is self:
            self._steps = None


class CallSyntax(Protocol):
    """How a family writes calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts at which a call may begin."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that it is made of, which may be special tokens."""

    @property
    def is_flat(self) -> bool:
        """Whether each argument stands for itself, not within one JSON object."""

    def parse(self, source: Source, answer: Answer, tools: OfferedTools) -> Step[None]:
        """Read the calls at a marker. Raises NoCall, before anything is passed on, if the text has none there."""

    def required(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool) -> TagFormat:
        """A guide's form of at least one call and nothing else. `schemas`: of the arguments, by the function's name."""

    def possible(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool, excludes: Sequence[str]) -> TagFormat:
        """A guide's form of free text, without `excludes`, with or without calls."""


def parse_answer(
    source: Source,
    answer: Answer,
    thinking: Thinking | None,
    state: ThinkingState,
    syntaxes: Sequence[CallSyntax],
    tools: OfferedTools,
) -> Step[None]:
    """The steps of an answer: reasoning, then content and calls."""
    calls = _Calls(syntaxes if tools else (), tools)
    if thinking is not None and (yield from thinking.read_begin(source, answer, state)):
        yield from _read_reasoning(source, answer, thinking, calls)
    markers = Markers(calls.markers)
    while (marker := (yield from source.until(markers, answer.content))) is not None:
        if not (yield from calls.read(source, answer, marker)):
            source.skip(len(marker))
            answer.content(marker)


def _read_reasoning(source: Source, answer: Answer, thinking: Thinking, calls: _Calls) -> Step[None]:
    markers = Markers([thinking.end, *(calls.markers if thinking.ends_at_calls else ())])
    while (marker := (yield from source.until(markers, answer.reasoning))) is not None:
        if marker == thinking.end:
            source.skip(len(marker))
            answer.marker()
            return
        if (yield from calls.read(source, answer, marker)):
            return
        source.skip(len(marker))
        answer.reasoning(marker)


class _Calls:
    """The ways in which a family writes calls, tried in their order."""

    def __init__(self, syntaxes: Sequence[CallSyntax], tools: OfferedTools) -> None:
        self._syntaxes = syntaxes
        self._tools = tools
        self.markers = tuple(marker for syntax in syntaxes for marker in syntax.markers)

    def read(self, source: Source, answer: Answer, marker: str) -> Step[bool]:
        """Read the calls at `marker`, which comes next. Return whether there are any."""
        for syntax in self._syntaxes:
            if marker in syntax.markers:
                source.mark()
                try:
                    yield from syntax.parse(source, answer, self._tools)
                except NoCall:
                    source.reset()
                else:
                    return True
        return False
