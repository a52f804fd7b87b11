"""`JsonCalls`: calls that are JSON objects with a name and arguments (Hermes, Qwen, Llama 3, Mistral's list)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.json_text import copy_value, read_string, skip_to_end, skip_value
from tensorweave.router.chat_formats.source import NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import JsonForm, TagFormat, calls_in_text, separated, tag
from tensorweave.router.chat_formats.tools import GuidedSpelling, OfferedTools

_BARE_BEGIN: Final = '{"name": "'


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
        guided_spelling: See there.
    """

    begin: str
    end: str = ""
    arguments_key: str = "arguments"
    gap: str = ""
    in_list: bool = False
    separator: str = "\n"
    guided_spelling: GuidedSpelling = "any"

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.begin, self.end)

    @property
    def is_flat(self) -> bool:
        return False

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin or "{",)

    def required(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool) -> TagFormat:
        if self.in_list:
            calls = separated(self._tags(schemas, "", "}"), ", ", is_parallel=is_parallel)
            return tag(f"{self.begin}[", calls, f"]{self.end}")
        return separated(self._whole_tags(schemas), self.separator, is_parallel=is_parallel)

    def possible(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool, excludes: Sequence[str]) -> TagFormat:
        tags = [self.required(schemas, is_parallel=is_parallel)] if self.in_list else self._whole_tags(schemas)
        trigger = self.begin or _BARE_BEGIN
        return calls_in_text([trigger], tags, is_parallel=is_parallel, excludes=excludes)

    def _whole_tags(self, schemas: Mapping[str, JsonForm]) -> list[TagFormat]:
        return self._tags(schemas, self.begin + self.gap, "}" + self.gap + self.end)

    def _tags(self, schemas: Mapping[str, JsonForm], before: str, after: str) -> list[TagFormat]:
        return [
            tag(f'{before}{_BARE_BEGIN}{name}", "{self.arguments_key}": ', schema.tag(), after)
            for name, schema in schemas.items()
        ]

    def parse(self, source: Source, answer: Answer, tools: OfferedTools) -> Step[None]:
        if self.begin:
            yield from source.take(self.begin)
        in_list = bool(self.begin) and (yield from source.spaces()) == "["
        source.skip(1 if in_list else 0)
        call = _Call(source, answer, self, tools)
        yield from call.read()
        while (yield from _finds_another(source, in_list)):
            source.mark()
            try:
                yield from _Call(source, answer, self, tools).read()
            except NoCall:
                source.reset()
                return
        yield from _close(source, in_list, self.end)


def _finds_another(source: Source, in_list: bool) -> Step[bool]:
    """Read what may stand between two calls. Return whether an object follows."""
    following = yield from source.spaces()
    if following == "," and in_list:
        source.skip(1)
        following = yield from source.spaces()
    elif following in (",", ";"):
        with contextlib.suppress(NoCall), source.restored():
            source.skip(1)
            following = yield from source.spaces()
            if following != "{":
                raise NoCall
    return following == "{"


def _close(source: Source, in_list: bool, end: str) -> Step[None]:
    """Read the end of the calls: brackets, of which models write too many or too few, and the marker."""
    if end:
        yield from skip_to_end(source, end)
    elif in_list:
        yield from source.spaces()
        yield from source.take("]")


class _Call:
    """The object of one call, key after key. The call starts as soon as its name is known and its arguments begin."""

    def __init__(self, source: Source, answer: Answer, syntax: JsonCalls, tools: OfferedTools) -> None:
        self._source = source
        self._answer = answer
        self._tools = tools
        self._is_bare = not syntax.begin
        self._spelling = syntax.guided_spelling
        self._is_as_guided = False
        self._stops = (syntax.end,) if syntax.end else ()
        self._name: str | None = None
        self._id: str | None = None
        self._early_arguments = ""
        self._has_started = False

    def read(self) -> Step[None]:
        """Raises NoCall if no call has started."""
        try:
            yield from self._read_object()
        except NoCall:
            if not self._has_started:
                raise
        self._answer.end_call()

    def _read_object(self) -> Step[None]:
        source = self._source
        if self._spelling == "as guided":
            self._is_as_guided = (yield from source.next_of(_BARE_BEGIN)) is not None
        yield from source.expect("{")
        while True:
            key = yield from read_string(source)
            yield from source.expect(":")
            yield from source.spaces()
            yield from self._read_value(key)
            if (yield from source.spaces()) != ",":
                break
            source.skip(1)
        if not self._stops or not (yield from source.next_of(*self._stops)):
            yield from source.expect("}")
        if not self._has_started:
            self._start()
            self._answer.arguments(self._early_arguments or "{}")

    def _read_value(self, key: str) -> Step[None]:
        match key:
            case "name":
                self._name = yield from read_string(self._source)
                self._check_name(self._name)
            case "arguments" | "parameters" if not self._has_started:
                yield from self._read_arguments()
            case "id" | "type" if (yield from self._source.peek(1)) == '"':
                text = yield from read_string(self._source)
                self._id = text if key == "id" else self._id
            case _ if self._is_bare and self._name is None:
                raise NoCall
            case _:
                yield from skip_value(self._source)

    def _check_name(self, name: str) -> None:
        is_known = not self._is_bare or name in self._tools
        if not is_known or not self._tools.permit(self._spelling, is_as_guided=self._is_as_guided):
            raise NoCall

    def _read_arguments(self) -> Step[None]:
        first = yield from self._source.peek(1)
        if first != "{":
            self._early_arguments = yield from self._read_odd_arguments()
        elif self._name is not None:
            self._start()
            if not (yield from copy_value(self._source, self._answer.arguments, self._stops)):
                raise NoCall
        else:
            pieces: list[str] = []
            yield from copy_value(self._source, pieces.append, self._stops)
            self._early_arguments = "".join(pieces)

    def _read_odd_arguments(self) -> Step[str]:
        """Arguments that are not an object: null, or a string that holds the object."""
        pieces: list[str] = []
        if not (yield from copy_value(self._source, pieces.append, self._stops)):
            raise NoCall
        text = "".join(pieces)
        if text.startswith('"'):
            inner: str = json.loads(text)
            return inner if inner.lstrip().startswith("{") else text
        return "{}" if text == "null" else text

    def _start(self) -> None:
        if self._name is None:
            raise NoCall
        self._source.release()
        self._answer.start_call(self._name, self._id)
        self._has_started = True
