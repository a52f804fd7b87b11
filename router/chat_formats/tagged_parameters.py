"""`TaggedParameters`: arguments of which each stands between tags (Qwen3-Coder, GLM, MiniMax, DeepSeek V3.2)."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.parameter_types import ParameterType, parameter_type
from tensorweave.router.chat_formats.source import Markers, NoCall, Source, Step

_KEY: Final = re.compile(r"[^<>\"\n]+")
_STRING: Final = ParameterType(("string",))
_NO_STRING: Final = ParameterType()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggedParameters:
    """Each parameter is `begin`, its name, `name_end`, `value_begin`, its value, `end`.

    Strings stand there as they are, without quotes; everything else as JSON. So the tool's schema decides.

    Args:
        is_padded: A line break after the value's begin and before its end belongs to the tags.
        says_type: `name_end` is followed by `true">` for a string and `false">` for JSON.
        style: xgrammar's name.
    """

    begin: str
    name_end: str
    end: str
    style: str
    value_begin: str = ""
    is_padded: bool = False
    says_type: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.begin, self.name_end, self.value_begin, self.end)

    def is_next(self, source: Source, ends: Sequence[str]) -> Step[bool]:
        """Whether a parameter, or the end of a call without parameters, comes next."""
        return (yield from source.next_of(self.begin, *ends)) is not None

    def copy(self, source: Source, answer: Answer, schema: Mapping[str, Any], ends: Sequence[str]) -> Step[None]:
        """Read parameters and pass them on as one JSON object, which is complete if one of `ends` follows, the first
        of which is read then."""
        answer.arguments("{")
        separator = ""
        while (key_and_kind := (yield from self._read_key(source, schema))) is not None:
            key, kind = key_and_kind
            answer.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._copy_value(source, answer, kind, ends)):
                return
            separator = ", "
        if (yield from source.next_of(*ends)) is not None:
            answer.arguments("}")
        yield from source.take_closing(ends[0])

    def _read_key(self, source: Source, schema: Mapping[str, Any]) -> Step[tuple[str, ParameterType] | None]:
        """Read a parameter up to its value; None if there is none."""
        yield from source.spaces()
        with contextlib.suppress(NoCall), source.restored():
            yield from source.expect(self.begin)
            key = (yield from source.word(_KEY)).strip()
            yield from source.expect(self.name_end)
            kind = parameter_type(schema, key)
            if self.says_type:
                kind = _STRING if (yield from source.expect('true">', 'false">')) == 'true">' else _NO_STRING
            if self.value_begin:
                yield from source.expect(self.value_begin)
            return key, kind
        return None

    def _copy_value(self, source: Source, answer: Answer, kind: ParameterType, ends: Sequence[str]) -> Step[bool]:
        """Return whether the value has ended."""
        if self.is_padded:
            yield from source.take("\n")
        pieces: list[str] = []
        text = _StringText(answer.arguments, is_padded=self.is_padded)
        emit = text.add if kind.is_text else pieces.append
        if kind.is_text:
            answer.arguments('"')
        while (yield from source.until(_markers(self.end), emit, drops_cut=True)) is not None:
            is_end = yield from self._ends_here(source, ends)
            if source.is_exhausted:
                return False
            if is_end:
                raw = "".join(pieces)
                raw = raw.removesuffix("\n") if self.is_padded else raw
                answer.arguments('"' if kind.is_text else kind.to_json(raw))
                return True
            source.skip(len(self.end))
            emit(self.end)
        return False

    def _ends_here(self, source: Source, ends: Sequence[str]) -> Step[bool]:
        """Whether the end tag that comes next is one: another parameter or the end of the call follows. Otherwise it
        is part of the value. If it is, or if the text ends first, read it."""
        options = (self.begin, *ends)
        with contextlib.suppress(NoCall), source.restored():
            source.skip(len(self.end))
            yield from source.spaces()
            if (yield from source.next_of(*options)) is not None:
                return True
            if source.ends_in(*options):
                source.skip_rest()
            raise NoCall
        return False


class _StringText:
    """A text as the inside of a JSON string; `is_padded`: without one line break at the end."""

    def __init__(self, emit: Callable[[str], None], *, is_padded: bool) -> None:
        self._emit = emit
        self._is_padded = is_padded
        self._held = ""

    def add(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if self._is_padded and text.endswith("\n") else ""
        self._emit(json.dumps(text.removesuffix(self._held), ensure_ascii=False)[1:-1])


@functools.cache
def _markers(end: str) -> Markers:
    return Markers([end])
