"""The parts of xgrammar's structural tags that guides are made of, as JSON. Workers compile them (`workers/guided/`).

Written here because xgrammar's own builders import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.guide import DEFAULT_MAX_WHITESPACE

_FLAT_KEYWORDS: Final = frozenset({"$defs", "type", "properties", "required", "additionalProperties"})
TagFormat = dict[str, Any]
"""A format of xgrammar's `structural_tag` module, in its JSON form."""


def tag(begin: str, content: TagFormat, end: str) -> TagFormat:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: TagFormat) -> TagFormat:
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": list(elements)}


def one_of(*elements: TagFormat) -> TagFormat:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def optional(content: TagFormat) -> TagFormat:
    return {"type": "optional", "content": content}


def any_number_of(content: TagFormat) -> TagFormat:
    return {"type": "star", "content": content}


def any_text(max_tokens: int | None = None, excludes: Sequence[str] = ()) -> TagFormat:
    """`excludes`: texts that do not occur in it."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {"type": "any_text", **limit, **({"excludes": list(excludes)} if excludes else {})}


def constant(text: str) -> TagFormat:
    return {"type": "const_string", "value": text}


def matching(pattern: str) -> TagFormat:
    return {"type": "regex", "pattern": pattern}


@dataclass(frozen=True, slots=True)
class JsonForm:
    """JSON that follows a schema.

    Args:
        schema: In the form that `router/guided/` writes for xgrammar.
        max_whitespace: Between two elements. White space has to be possible here: 0 is read as 1.
        grammar: Used instead of the schema, where xgrammar would not enforce all of that.
    """

    schema: Mapping[str, Any] | bool
    max_whitespace: int = DEFAULT_MAX_WHITESPACE
    grammar: str | None = None

    def tag(self, style: str = "json") -> TagFormat:
        """`style`: xgrammar's name for what is written instead of the JSON of an object."""
        if self.grammar is not None:
            assert style == "json", "a grammar is one of JSON"
            return {"type": "grammar", "grammar": self.grammar}
        form = {"type": "json_schema", "json_schema": self.schema, "max_whitespace_cnt": max(1, self.max_whitespace)}
        return form if style == "json" else {**form, "style": style}

    @property
    def properties(self) -> dict[str, JsonForm]:
        """The forms of an object's properties."""
        assert isinstance(self.schema, Mapping)
        definitions = {"$defs": self.schema["$defs"]} if "$defs" in self.schema else {}
        return {
            name: JsonForm({**schema, **definitions} if isinstance(schema, Mapping) else schema, self.max_whitespace)
            for name, schema in self.schema.get("properties", {}).items()
        }

    def flattened(self) -> JsonForm | None:
        """The same, as one object of which each property stands for itself; None if it is not one."""
        schema = self.schema
        while isinstance(schema, Mapping) and set(schema) <= {"$ref", "$defs"}:
            definitions = schema["$defs"]
            schema = {**definitions[schema["$ref"].removeprefix("#/$defs/")], "$defs": definitions}
        is_flat = isinstance(schema, Mapping) and set(schema) <= _FLAT_KEYWORDS and schema.get("type") == "object"
        return JsonForm(schema, self.max_whitespace) if is_flat else None


def separated(tags: Sequence[TagFormat], separator: str, *, is_parallel: bool) -> TagFormat:
    """At least one of the tags; several only if `is_parallel`."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not is_parallel,
    }


def calls_in_text(
    triggers: Sequence[str], tags: Sequence[TagFormat], *, is_parallel: bool, excludes: Sequence[str]
) -> TagFormat:
    """Free text without `excludes`, in which each trigger begins a tag, the first only unless `is_parallel`."""
    return {
        "type": "triggered_tags",
        "triggers": list(triggers),
        "tags": list(tags),
        "stop_after_first": not is_parallel,
        "excludes": list(excludes),
    }
