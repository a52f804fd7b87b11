"""`Channels`: answers that consist of messages in channels (gpt-oss's harmony format)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.guide import WantedAnswer
from tensorweave.router.chat_formats.json_text import copy_value
from tensorweave.router.chat_formats.source import Markers, NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import (
    JsonForm,
    TagFormat,
    any_text,
    constant,
    one_of,
    optional,
    sequence,
    tag,
)
from tensorweave.router.chat_formats.tools import OfferedTools

_MAX_HEADER_CHARS: Final = 512
_RECIPIENT: Final = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_START, _CHANNEL_MARK, _MESSAGE, _CALL = "<|start|>", "<|channel|>", "<|message|>", "<|call|>"
_END, _RETURN = "<|end|>", "<|return|>"
_ENDS: Final = (_END, _RETURN, _CALL)
_BETWEEN: Final = Markers([_START, _CHANNEL_MARK, *_ENDS])
_HEADER_END: Final = Markers([_MESSAGE, *_ENDS])
_NEXT: Final = f"{_START}assistant"


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """A message is a header, `<|message|>` and a text. The header has a channel and perhaps a recipient:
    `<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>`, of which the prompt has
    written the beginning. The channel `analysis` is reasoning, a message to a function is a call, all others are
    content.
    """

    @property
    def markers(self) -> tuple[str, ...]:
        return (_START, _CHANNEL_MARK, _MESSAGE, "<|constrain|>", *_ENDS)

    def steps(self, source: Source, answer: Answer, tools: OfferedTools, turn: str) -> Step[None]:
        """Parse an answer that continues `turn`, what the prompt has of the assistant's turn."""
        header = turn[turn.rfind(_START) :] if _START in turn else ""
        if _MESSAGE in header:
            answer.marker()
            yield from self._copy_message(source, answer, tools, header)
        elif (yield from source.next_of(" to=", "to=")):
            yield from self._read_message(source, answer, tools)
        while (marker := (yield from source.until(_BETWEEN, answer.content, drops_cut=True))) is not None:
            if marker in _ENDS:
                source.skip(len(marker))
                answer.marker()
            elif not (yield from self._read_message(source, answer, tools)):
                source.skip(len(marker))
                answer.content(marker)

    def _read_message(self, source: Source, answer: Answer, tools: OfferedTools) -> Step[bool]:
        pieces: list[str] = []
        source.mark()
        try:
            end = yield from source.until(_HEADER_END, pieces.append)
        except NoCall:
            end = _END
        header = "".join(pieces)
        if end is None:
            source.release()
            return True
        if end != _MESSAGE or len(header) > _MAX_HEADER_CHARS:
            source.reset()
            return False
        source.skip(len(end))
        source.release()
        answer.marker()
        yield from self._copy_message(source, answer, tools, header)
        return True

    def _copy_message(self, source: Source, answer: Answer, tools: OfferedTools, header: str) -> Step[None]:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient and tools:
            answer.start_call(recipient.group(1))
            yield from _copy_arguments(source, answer)
            answer.end_call()
            return
        is_analysis = channel is not None and channel.group(1) == "analysis"
        emit = answer.reasoning if is_analysis else answer.content
        if (yield from source.until(_BETWEEN, emit, drops_cut=True)) is not None:
            answer.marker()

    def tag(self, wanted: WantedAnswer) -> TagFormat:
        """What follows the reasoning, as a part of a guide. The model ends its turn after a call, so there are never
        several."""
        calls = [_call_tag(name, schema) for name, schema in wanted.schemas.items()]
        if wanted.must_call:
            return one_of(*calls)
        text = wanted.form or any_text(excludes=self.markers)
        final = sequence(constant(f"{_CHANNEL_MARK}final{_MESSAGE}"), text)
        preamble = optional(tag(f"{_CHANNEL_MARK}commentary{_MESSAGE}", any_text(), _END + _NEXT))
        return one_of(final, sequence(preamble, one_of(*calls))) if calls else final

    def thinking(self, max_tokens: int | None) -> TagFormat:
        """The reasoning in a guide."""
        return optional(tag(f"{_CHANNEL_MARK}analysis{_MESSAGE}", any_text(max_tokens), _END + _NEXT))


def _copy_arguments(source: Source, answer: Answer) -> Step[None]:
    if (yield from source.spaces()) == "{":
        yield from copy_value(source, answer.arguments, _ENDS)
    else:
        yield from source.until(_BETWEEN, answer.arguments, drops_cut=True)


def _call_tag(name: str, schema: JsonForm) -> TagFormat:
    begin = f"{_CHANNEL_MARK}commentary to=functions.{name} <|constrain|>json{_MESSAGE}"
    return sequence(constant(begin), schema.tag())
