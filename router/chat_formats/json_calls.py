"""`JsonCalls`: calls that are JSON objects with a name and arguments (Hermes, Qwen, Llama 3, Mistral's list)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import orjson

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.json_text import copy_value, read_string, skip_value
from tensorweave.router.chat_formats.source import NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import CallTags, json_text, tag


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonCalls:
    """One object, or several in a list or one after the other, between two markers.

    Args:
        begin: The text before the calls; "": they stand in the content without a marker, and only objects that name a
            tool of the request are calls.
        end: The text after them; "": none.
        arguments_key: The key of the arguments, as the model has learned it. Models mix `arguments` and `parameters`,
            so both are read.
        gap: White space between the markers and the object.
        in_list: The objects stand in a list; otherwise each has its own markers, or `separator` lies between.
    """

    begin: str
    end: str = ""
    arguments_key: str = "arguments"
    gap: str = ""
    in_list: bool = False
    separator: str = "\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin or "{",)

    @property
    def trigger(self) -> str:
        return self.begin or '{"name": '

    def call_tags(self, schemas: Mapping[str, Mapping[str, Any]]) -> CallTags:
        before, after = (self.begin + self.gap, self.gap + self.end) if not self.in_list else ("", "")
        tags = [
            tag(f'{before}{{"name": "{name}", "{self.arguments_key}": ', json_text(schema), "}" + after)
            for name, schema in schemas.items()
        ]
        if self.in_list:
            return CallTags(tags, f"{self.begin}[", f"]{self.end}", ", ")
        return CallTags(tags, separator=self.separator)

    def parse(self, source: Source, answer: Answer, names: Set[str]) -> Step[None]:
        """Read the calls at a marker. Raises NoCall, before anything is passed on, if the text has none there."""
        if self.begin:
            yield from source.take(self.begin)
        in_list = bool(self.begin) and (yield from source.spaces()) == "["
        source.skip(1 if in_list else 0)
        known = None if self.begin else names
        yield from _parse_object(source, answer, known, self.end)
        while (yield from _finds_another(source, in_list)):
            source.mark()
            try:
                yield from _parse_object(source, answer, known, self.end)
            except NoCall:
                source.reset()
                return
        yield from _close(source, in_list, self.end)


def _finds_another(source: Source, in_list: bool) -> Step[bool]:
    """Read what may stand between two calls."""
    source.mark()
    following = yield from source.spaces()
    if following in (",", ";"):
        source.skip(1)
        following = yield from source.spaces()
        if in_list or following == "":
            source.release()
    if following == "{":
        source.release()
        return True
    if source.is_marked:
        source.reset()
    return False


def _close(source: Source, in_list: bool, end: str) -> Step[None]:
    """Read the end of the calls: brackets, of which models write too many or too few, and the marker."""
    source.mark()
    while (following := (yield from source.spaces())) in (("}", "]") if end else ("]",) if in_list else ()):
        source.skip(1)
        if not end:
            source.release()
            return
    if end and ((yield from source.take_closing(end)) or following == ""):
        source.release()
    else:
        source.reset()


def _parse_object(source: Source, answer: Answer, known: Set[str] | None, end: str) -> Step[None]:
    call = _Call(source, answer, known, end or None)
    try:
        yield from call.read()
    except NoCall:
        if not call.has_started:
            raise
    answer.end_call()


class _Call:
    """The object of one call, key after key. The call starts as soon as its name is known and its arguments begin.

    Args:
        known: The call's name must be one of these; None: any.
        stop: The marker that ends the arguments wherever it stands outside of their strings.
    """

    def __init__(self, source: Source, answer: Answer, known: Set[str] | None, stop: str | None) -> None:
        self._source = source
        self._answer = answer
        self._known = known
        self._stop = stop
        self._name: str | None = None
        self._id: str | None = None
        self._early_arguments = ""
        self.has_started = False

    def read(self) -> Step[None]:
        """Raises NoCall where the object is not what it should be, also after the call has started."""
        source = self._source
        yield from self._expect("{")
        while True:
            key = yield from read_string(source)
            yield from self._expect(":")
            yield from source.spaces()
            yield from self._read_value(key)
            if (yield from source.spaces()) != ",":
                break
            source.skip(1)
        if self._stop is None or not (yield from source.next_of(self._stop)):
            yield from self._expect("}")
        if not self.has_started:
            self._start()
            self._answer.arguments(self._early_arguments or "{}")

    def _expect(self, char: str) -> Step[None]:
        if (yield from self._source.spaces()) != char:
            raise NoCall
        self._source.skip(1)

    def _read_value(self, key: str) -> Step[None]:
        match key:
            case "name":
                self._name = yield from read_string(self._source)
                if self._known is not None and self._name not in self._known:
                    raise NoCall
            case "arguments" | "parameters" if not self.has_started:
                yield from self._read_arguments()
            case "id" if (yield from self._source.peek(1)) == '"':
                self._id = yield from read_string(self._source)
            case "type" | "id":
                yield from skip_value(self._source)
            case _ if self._known is None or self._name is not None:
                yield from skip_value(self._source)
            case _:
                raise NoCall

    def _read_arguments(self) -> Step[None]:
        first = yield from self._source.peek(1)
        if first != "{":
            self._early_arguments = yield from self._read_odd_arguments()
        elif self._name is not None:
            self._start()
            if not (yield from copy_value(self._source, self._answer.arguments, self._stop)):
                raise NoCall
        else:
            pieces: list[str] = []
            yield from copy_value(self._source, pieces.append, self._stop)
            self._early_arguments = "".join(pieces)

    def _read_odd_arguments(self) -> Step[str]:
        """Arguments that are not an object: null, or a string that holds the object."""
        pieces: list[str] = []
        if not (yield from copy_value(self._source, pieces.append, self._stop)):
            raise NoCall
        text = "".join(pieces)
        if text.startswith('"'):
            inner: str = orjson.loads(text)
            return inner if inner.lstrip().startswith("{") else text
        return "{}" if text == "null" else text

    def _start(self) -> None:
        if self._name is None:
            raise NoCall
        self._source.release()
        self._answer.start_call(self._name, self._id)
        self.has_started = True
