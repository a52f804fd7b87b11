"""`NamedCalls`: calls whose name stands before their arguments, which are JSON or tagged parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.json_text import copy_value, skip_to_end
from tensorweave.router.chat_formats.source import NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import (
    JsonForm,
    TagFormat,
    calls_in_text,
    constant,
    matching,
    separated,
    sequence,
    tag,
)
from tensorweave.router.chat_formats.tagged_parameters import TaggedParameters
from tensorweave.router.chat_formats.tools import OfferedTools

_HEADER: Final = re.compile(r"[\w.:/\-]+")
_NAME_OF_ID: Final = re.compile(r"(?:functions\.)?([\w.\-]+?)(?::\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedCalls:
    """A call is `begin`, its name, `name_end`, its arguments, `end`.

    Args:
        name_end: What follows the name; "": white space or the arguments.
        section: Markers around all calls of an answer, or around each if `wraps_each`. A call outside of a section
            must be of one of the request's functions.
        parameters: The arguments' tags; None: they are JSON, perhaps in a code fence.
        name_prefix: Stands before each name.
        id_mark: Stands between the name and the call's id, if the model writes one.
        name_is_id: What stands in the name's place is the call's id, `functions.NAME:INDEX`.
        written: What a guide lets the model write before the arguments, where {name} stands for the name, after them
            and between calls, without a section around all calls.
    """

    begin: str
    name_end: str
    end: str
    written: tuple[str, str, str]
    section: tuple[str, str] | None = None
    wraps_each: bool = False
    parameters: TaggedParameters | None = None
    name_prefix: str = ""
    id_mark: str = ""
    name_is_id: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        own = (self.begin, self.name_prefix, self.name_end, self.id_mark, self.end, *(self.section or ()))
        return own if self.parameters is None else (*own, *self.parameters.texts)

    @property
    def is_flat(self) -> bool:
        return self.parameters is not None

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin,) if self.section is None else (self.section[0], self.begin)

    @property
    def _ends(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.end, self.section[1] if self.section else "")))

    def parse(self, source: Source, answer: Answer, tools: OfferedTools) -> Step[None]:
        in_section = self.section is not None and (yield from source.take(self.section[0])) is not None
        must_know = self.section is not None and not in_section
        yield from self._parse_call(source, answer, tools, must_know=must_know)
        while True:
            yield from source.spaces()
            if self.section and (yield from source.take_closing(self.section[1])):
                return
            source.mark()
            try:
                yield from self._parse_call(source, answer, tools, must_know=must_know)
            except NoCall:
                source.reset()
                return

    def _parse_call(self, source: Source, answer: Answer, tools: OfferedTools, *, must_know: bool) -> Step[None]:
        name, call_id = yield from self._read_header(source)
        if must_know and name not in tools:
            raise NoCall
        if self.parameters is None:
            yield from self._copy_json(source, answer, name, call_id)
        else:
            yield from source.spaces()
            if not (yield from self.parameters.is_next(source, self._ends)):
                raise NoCall
            source.release()
            answer.start_call(name, call_id)
            yield from self.parameters.copy(source, answer, tools.parameters(name), self._ends)
        answer.end_call()

    def _read_header(self, source: Source) -> Step[tuple[str, str | None]]:
        yield from source.expect(self.begin)
        yield from source.spaces()
        if self.name_prefix:
            yield from source.take(self.name_prefix)
        header = yield from source.word(_HEADER)
        call_id = None
        if self.name_is_id and (match := _NAME_OF_ID.fullmatch(header)):
            call_id, header = header, match.group(1)
        if self.id_mark and (yield from source.take(self.id_mark)):
            call_id = yield from source.word(_HEADER)
        if not header:
            raise NoCall
        if self.name_end:
            yield from source.expect(self.name_end)
        return header, call_id

    def _copy_json(self, source: Source, answer: Answer, name: str, call_id: str | None) -> Step[None]:
        yield from source.spaces()
        yield from source.take("```json", "```")
        following = yield from source.spaces()
        is_empty = following != "{" and bool(self.end) and (yield from source.next_of(self.end)) is not None
        if following != "{" and not is_empty:
            raise NoCall
        source.release()
        answer.start_call(name, call_id)
        if is_empty:
            answer.arguments("{}")
        elif not (yield from copy_value(source, answer.arguments, (self.end,) if self.end else ())):
            yield from source.take(self.end)
            return
        if self.end:
            yield from source.spaces()
            yield from source.take_closing("```")
            yield from skip_to_end(source, self.end)

    def required(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool) -> TagFormat:
        calls = separated(self._tags(schemas), self.written[2], is_parallel=is_parallel)
        return calls if self.section is None or self.wraps_each else tag(self.section[0], calls, self.section[1])

    def possible(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool, excludes: Sequence[str]) -> TagFormat:
        is_group = self.section is not None and not self.wraps_each
        tags = [self.required(schemas, is_parallel=is_parallel)] if is_group else self._tags(schemas)
        excludes = (*excludes, *self.markers[1:])
        return calls_in_text([self.markers[0]], tags, is_parallel=is_parallel, excludes=excludes)

    def _tags(self, schemas: Mapping[str, JsonForm]) -> list[TagFormat]:
        style = self.parameters.style if self.parameters else "json"
        return [self._tag(name, schema.tag(style)) for name, schema in schemas.items()]

    def _tag(self, name: str, arguments: TagFormat) -> TagFormat:
        before, after, _ = self.written
        begin, _, rest = before.replace("{name}", name).partition("{number}")
        if rest:
            arguments = sequence(matching(r"\d{1,3}"), constant(rest), arguments)
        return tag(begin, arguments, after)
