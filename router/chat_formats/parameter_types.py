"""From the text of one argument, written between tags, to JSON, by what the tool's schema says of it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from tensorweave.router.chat_formats.json_text import JSON_NUMBER

_MAX_REFERENCES: Final = 32
_MAX_LITERAL_CHARS: Final = 65_536
_WHOLE: Final = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?", re.ASCII)
_WORDS: Final = {"boolean": {"true": "true", "false": "false"}, "null": {"null": "null", "none": "null"}}


@dataclass(frozen=True, slots=True)
class ParameterType:
    """What a schema says of one parameter.

    Args:
        types: JSON schema's names of its possible types, in the schema's order; empty: it says nothing.
        values: All its possible values, if they are listed.
    """

    types: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether its text is a string as it stands. One of listed values may have white space around it."""
        return self.types == ("string",) and not self.values

    def to_json(self, text: str) -> str:
        """The JSON of a parameter that was written as `text`. What fits no type is a string."""
        for value in self.values:
            written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if written == text.strip():
                return json.dumps(value, ensure_ascii=False)
        if "null" in self.types and text.strip() in ("null", "None"):
            return "null"
        for name in self.types or ("number", "boolean", "null", "object", "array"):
            if (converted := _convert(text, name)) is not None:
                return converted
        return json.dumps(text, ensure_ascii=False)


def parameter_type(parameters: Mapping[str, Any], name: str) -> ParameterType:
    """The type of the parameter `name` of a function whose arguments have the schema `parameters`."""
    for schema in _alternatives(parameters, parameters):
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            return _read(properties[name], parameters)
    extra = parameters.get("additionalProperties")
    return _read(extra, parameters) if isinstance(extra, Mapping) else ParameterType()


def _read(schema: Any, root: Mapping[str, Any]) -> ParameterType:
    types: list[str] = []
    values: list[Any] = []
    for one in _alternatives(schema, root):
        enum = one.get("enum")
        listed = [one["const"]] if "const" in one else enum if isinstance(enum, list) else []
        values += listed
        declared = one.get("type")
        types += [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
        if "type" not in one:
            types += [_type_of(value) for value in listed]
    return ParameterType(tuple(dict.fromkeys(t for t in types if isinstance(t, str))), tuple(values))


def _alternatives(schema: Any, root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema and those that it refers to or is made of, as far as they apply to the same value."""
    waiting, budget = [schema], _MAX_REFERENCES
    while waiting and budget:
        budget -= 1
        one = waiting.pop(0)
        if not isinstance(one, Mapping):
            continue
        yield one
        if isinstance(reference := one.get("$ref"), str):
            waiting.append(_resolve(reference, root))
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(parts := one.get(key), list):
                waiting += parts


def _resolve(reference: str, root: Any) -> Any:
    """What `#/$defs/Name` stands for; None if it is not there."""
    if not reference.startswith("#"):
        return None
    for key in filter(None, reference[1:].split("/")):
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case dict():
            return "object"
    return "array"


def _convert(text: str, type_name: str) -> str | None:
    """The JSON of a text that is a value of this type, else None."""
    if type_name == "string":
        return json.dumps(text, ensure_ascii=False)
    text = text.strip()
    match type_name:
        case "integer":
            whole = _WHOLE.fullmatch(text)
            return whole.group(1) if whole else None
        case "number":
            return text if JSON_NUMBER.fullmatch(text) else None
        case "boolean" | "null":
            return _WORDS[type_name].get(text.lower())
        case "object" | "array":
            return _convert_nested(text, "{" if type_name == "object" else "[")
    return None


def _convert_nested(text: str, opening: str) -> str | None:
    if not text.startswith((opening, "(") if opening == "[" else opening):
        return None
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return _convert_literal(text)
    return text


def _convert_literal(text: str) -> str | None:
    """Python's notation, in which some models write objects and lists."""
    if len(text) > _MAX_LITERAL_CHARS:
        return None
    try:
        return json.dumps(_read_literal(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, SystemError):
        return None


def _read_literal(text: str) -> Any:
    """Tried again, since in Python 3.11 a parse fails within which the garbage collector runs a finalizer that parses
    too, as printing a traceback does."""
    try:
        return ast.literal_eval(text)
    except SystemError:
        return ast.literal_eval(text)
