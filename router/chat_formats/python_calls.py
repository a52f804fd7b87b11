"""`PythonCalls`: calls written as Python calls with keyword arguments (Llama 4, Olmo 3)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.python_values import copy_python
from tensorweave.router.chat_formats.source import NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import (
    JsonForm,
    TagFormat,
    any_number_of,
    calls_in_text,
    constant,
    matching,
    one_of,
    optional,
    separated,
    sequence,
    tag,
)
from tensorweave.router.chat_formats.tools import GuidedSpelling, OfferedTools

_NAME: Final = re.compile(r"[\w.\-]+")
_ANY_ARGUMENTS: Final = optional(
    sequence(
        matching(r"[A-Za-z_]\w*="),
        JsonForm(True).tag(),
        any_number_of(sequence(matching(r", [A-Za-z_]\w*="), JsonForm(True).tag())),
    )
)
_KEYWORD: Final = re.compile(r"[\w.$\-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonCalls:
    """A list of calls, `[f(a=1), g()]`, or one call after the other.

    Args:
        section: Markers around the calls; None: the list stands in the content, and only a list that begins with one of
            the request's functions is one of calls.
        guided_spelling: See there.
        begin, separator, end: Around and between the calls, as a guide writes them.
    """

    section: tuple[str, str] | None = None
    guided_spelling: GuidedSpelling = "as guided"
    begin: str = "["
    separator: str = ", "
    end: str = "]"

    @property
    def texts(self) -> tuple[str, ...]:
        return self.section or ()

    @property
    def is_flat(self) -> bool:
        return True

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.section[0] if self.section else "[",)

    def parse(self, source: Source, answer: Answer, tools: OfferedTools) -> Step[None]:
        if self.section:
            yield from source.take(self.section[0])
            yield from source.spaces()
        in_list = (yield from source.take("[")) is not None
        yield from self._parse_call(source, answer, tools, is_first=True, in_list=in_list)
        while (yield from _finds_another(source, in_list)):
            source.mark()
            try:
                yield from self._parse_call(source, answer, tools, is_first=False, in_list=in_list)
            except NoCall:
                source.reset()
                return
        if self.section:
            yield from source.spaces()
            yield from source.take_closing(self.section[1])

    def _parse_call(
        self, source: Source, answer: Answer, tools: OfferedTools, *, is_first: bool, in_list: bool
    ) -> Step[None]:
        """The call starts with its first keyword, so that text with brackets stays text."""
        begins_with_space = (yield from source.peek(1)).isspace()
        yield from source.spaces()
        name = yield from source.word(_NAME)
        is_guided = not is_first or (in_list and not begins_with_space and (yield from source.peek(1)) == "(")
        yield from source.expect("(")
        if not name:
            raise NoCall
        is_known = self.section is not None or name in tools
        if not is_known or not tools.permit(self.guided_spelling, is_as_guided=is_guided):
            raise NoCall
        keyword = yield from _read_keyword(source)
        source.release()
        answer.start_call(name)
        with contextlib.suppress(NoCall):
            yield from _copy_arguments(source, answer, keyword)
        answer.end_call()

    def required(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool) -> TagFormat:
        calls = separated(
            [tag(f"{name}(", _arguments_tag(schema), ")") for name, schema in schemas.items()],
            self.separator,
            is_parallel=is_parallel,
        )
        before, after = self.section or ("", "")
        return tag(before + self.begin, calls, self.end + after)

    def possible(self, schemas: Mapping[str, JsonForm], *, is_parallel: bool, excludes: Sequence[str]) -> TagFormat:
        if self.section:
            tags, triggers = [self.required(schemas, is_parallel=is_parallel)], [self.section[0]]
        else:
            tags = [self._list_from(name, schemas, is_parallel=is_parallel) for name in schemas]
            triggers = [f"[{name}(" for name in schemas]
        return calls_in_text(triggers, tags, is_parallel=is_parallel, excludes=excludes)

    def _list_from(self, name: str, schemas: Mapping[str, JsonForm], *, is_parallel: bool) -> TagFormat:
        """A list whose first call is of `name`."""
        calls = [tag(f"{self.separator}{one}(", _arguments_tag(schema), ")") for one, schema in schemas.items()]
        others = [any_number_of(one_of(*calls))] if is_parallel else []
        return tag(f"[{name}(", sequence(_arguments_tag(schemas[name]), constant(")"), *others), "]")


def _finds_another(source: Source, in_list: bool) -> Step[bool]:
    """Read what stands between two calls, or the end of the list. Return whether a call follows."""
    following = yield from source.spaces()
    if not in_list:
        return following.isidentifier()
    yield from source.take(",", "]")
    return following == ","


def _read_keyword(source: Source) -> Step[str]:
    """Read `name=`; "" if the call has no more arguments. Raises NoCall if it is something else."""
    if (yield from source.spaces()) == ")":
        return ""
    with source.restored() if not source.is_marked else contextlib.nullcontext():
        keyword = yield from source.word(_KEYWORD)
        yield from source.expect("=")
        if not keyword:
            raise NoCall
    return keyword


def _copy_arguments(source: Source, answer: Answer, keyword: str) -> Step[None]:
    answer.arguments("{")
    separator = ""
    while keyword:
        answer.arguments(f"{separator}{json.dumps(keyword, ensure_ascii=False)}: ")
        yield from copy_python(source, answer.arguments)
        separator = ", "
        if (yield from source.spaces()) == ")":
            break
        yield from source.expect(",")
        keyword = yield from _read_keyword(source)
    yield from source.expect(")")
    answer.arguments("}")


def _arguments_tag(form: JsonForm) -> TagFormat:
    """Keyword arguments: the required ones, then the others, each in the schema's order; values as JSON, which is
    Python but for true, false and null."""
    assert isinstance(form.schema, Mapping)
    properties = form.properties
    required = [name for name in properties if name in form.schema.get("required", ())]
    others = [name for name in properties if name not in required]

    def argument(name: str, before: str = ", ") -> TagFormat:
        return sequence(constant(f"{before}{name}="), properties[name].tag())

    def rest(names: Sequence[str]) -> list[TagFormat]:
        return [optional(argument(name)) for name in names]

    if required:
        first, *more = required
        return sequence(argument(first, ""), *map(argument, more), *rest(others))
    if others:
        alternatives = [sequence(argument(name, ""), *rest(others[n + 1 :])) for n, name in enumerate(others)]
        return optional(one_of(*alternatives))
    return constant("") if form.schema.get("additionalProperties") is False else _ANY_ARGUMENTS
