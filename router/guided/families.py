"""The keywords that restrict values of one type, read to a shape of that type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

from tensorweave.router.guided import expressions, pattern
from tensorweave.router.guided.document import step
from tensorweave.router.guided.expressions import Expression, PatternError
from tensorweave.router.guided.formats import (
    FORMATS,
    FORMATS_OF_PATTERNS,
    KNOWN_PATTERNS,
    NUMBER_FORMATS,
    UNBOUND_ENCODINGS,
    UNBOUND_FORMATS,
)
from tensorweave.router.guided.refusal import Refusal
from tensorweave.router.guided.shapes import ANYTHING, Array, Bound, Number, Object, Text, Union, Values

Fields = Mapping[str, Any]
Read = Callable[[Any, str], Union]
"""A schema below, and its pointer, to a union."""

_NONE: Final = object()


class FamilyReader:
    """`read` reads the schemas below."""

    def __init__(self, read: Read, max_pattern_size: int) -> None:
        self._read = read
        self._max_pattern_size = max_pattern_size
        self._parsed: dict[str, Expression] = {}

    def text(self, fields: Fields, at: str) -> Text:
        patterns: list[Expression] = []
        if (written := fields.get("pattern", _NONE)) is not _NONE:
            patterns.append(self.expression(written, at))
        if "format" in fields:
            patterns += self._format(fields["format"], at, has_pattern=bool(patterns))
        if (name := fields.get("contentEncoding", _NONE)) is not _NONE:
            patterns += self._encoding(name, at)
        patterns = [expression for i, expression in enumerate(patterns) if expression not in patterns[:i]]
        return Text(count(fields, "minLength", at) or 0, count(fields, "maxLength", at), tuple(patterns), at)

    def expression(self, written: Any, at: str, keyword: str = "pattern") -> Expression:
        if not isinstance(written, str):
            raise Refusal(keyword, at, "must be a string")
        if written not in self._parsed:
            try:
                parsed = pattern.parse_search(KNOWN_PATTERNS.get(written, written))
                check_pattern_size(parsed, self._max_pattern_size)
            except PatternError as error:
                raise Refusal(keyword, at, f"cannot be enforced: {error}") from None
            self._parsed[written] = parsed
        return self._parsed[written]

    def number(self, fields: Fields, at: str, *, is_integer: bool) -> Number:
        lows = [bound for name in ("minimum", "exclusiveMinimum") if (bound := _bound(fields, name, at))]
        highs = [bound for name in ("maximum", "exclusiveMaximum") if (bound := _bound(fields, name, at))]
        if is_integer and (limits := NUMBER_FORMATS.get(str(fields.get("format")))):
            lows.append(Bound(Decimal(limits[0])))
            highs.append(Bound(Decimal(limits[1])))
        multiples: tuple[Decimal, ...] = ()
        if "multipleOf" in fields:
            multiples = (_number(fields["multipleOf"], "multipleOf", at),)
            if multiples[0] <= 0:
                raise Refusal("multipleOf", at, "must be above 0")
        return Number(
            is_integer,
            max(lows, key=lambda bound: (bound.value, bound.is_open), default=None),
            min(highs, key=lambda bound: (bound.value, not bound.is_open), default=None),
            multiples,
            at,
        )

    def array(self, fields: Fields, at: str) -> Array:
        items, prefix = fields.get("items", _NONE), fields.get("prefixItems", _NONE)
        if isinstance(items, list):  # before draft 2020-12
            if prefix is not _NONE:
                raise Refusal("items", at, "is a list, beside prefixItems")
            name, prefix, items = "items", items, fields.get("additionalItems", _NONE)
            rest_name = "additionalItems"
        else:
            name, rest_name = "prefixItems", "items"
            if "additionalItems" in fields and items is _NONE and prefix is not _NONE:
                raise Refusal("additionalItems", at, "has no meaning beside prefixItems; write items")
        if not isinstance(prefix, list) and prefix is not _NONE:
            raise Refusal(name, at, "must be a list of schemas")
        return Array(
            tuple(self._read(s, step(at, name, i)) for i, s in enumerate(prefix)) if isinstance(prefix, list) else (),
            None if items is _NONE else self._read(items, step(at, rest_name)),
            count(fields, "minItems", at) or 0,
            count(fields, "maxItems", at),
        )

    def object(self, fields: Fields, at: str) -> Object:
        required = fields.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise Refusal("required", at, "must be a list of strings")
        rest = fields.get("additionalProperties", _NONE)
        shape = Object(
            self._schemas(fields, "properties", at),
            tuple(dict.fromkeys(required)),
            tuple(
                (self.expression(text, at, "patternProperties"), union)
                for text, union in self._schemas(fields, "patternProperties", at).items()
            ),
            None if rest is _NONE else self._read(rest, step(at, "additionalProperties")),
            count(fields, "minProperties", at) or 0,
            count(fields, "maxProperties", at),
            at,
        )
        if "propertyNames" in fields:
            names = self._read(fields["propertyNames"], step(at, "propertyNames"))
            shape = self._with_names(shape, names, at)
        return shape

    def _with_names(self, shape: Object, names: Union, at: str) -> Object:
        """The object with its names restricted: to a list of names, or by an expression."""
        match [name for name in names if not _is_no_string(name)]:
            case [Values(values)] if not shape.patterns:
                kept = [name for name in values if isinstance(name, str)]
                rest = ANYTHING if shape.rest is None else shape.rest
                properties = {name: shape.properties.get(name, rest) for name in kept}
                return Object(properties, shape.required, (), (), shape.least, shape.most, at)
            case [Text(least, most, patterns)] | [Text(least, most, patterns), *_]:
                if not (least or most is not None or patterns):
                    return shape
                if len(names) > 1 or shape.properties or shape.patterns or len(patterns) > 1:
                    raise Refusal("propertyNames", at, "is not enforced beside properties and patternProperties")
                if patterns and (least or most is not None):
                    raise Refusal("propertyNames", at, "with both an expression and a length is not enforced")
                name = patterns[0] if patterns else expressions.Repeat(expressions.ANY_CHAR, least, most)
                value = ANYTHING if shape.rest is None else shape.rest
                return Object({}, shape.required, ((name, value),), (), shape.least, shape.most, at)
        if names == ANYTHING:
            return shape
        raise Refusal("propertyNames", at, "of this kind is not enforced by any backend")

    def _schemas(self, fields: Fields, name: str, at: str) -> dict[str, Union]:
        schemas = fields.get(name, {})
        if not isinstance(schemas, dict):
            raise Refusal(name, at, "must be an object of schemas")
        return {key: self._read(schema, step(at, name, key)) for key, schema in schemas.items()}

    def _encoding(self, name: Any, at: str) -> list[Expression]:
        if isinstance(name, str) and name in UNBOUND_ENCODINGS:
            return []
        if name not in ("base64", "base64url"):
            raise Refusal("contentEncoding", at, f"{str(name)[:64]!r} is not enforced by any backend")
        return [_format_expression(name)]

    def _format(self, name: Any, at: str, *, has_pattern: bool) -> list[Expression]:
        if not isinstance(name, str):
            raise Refusal("format", at, "must be a string")
        if name in UNBOUND_FORMATS or name in NUMBER_FORMATS or (has_pattern and name in FORMATS_OF_PATTERNS):
            return []
        if name not in FORMATS:
            raise Refusal("format", at, f"{name[:64]!r} is not enforced by any backend")
        return [_format_expression(name)]


@functools.cache
def _format_expression(name: str) -> Expression:
    return pattern.parse_match(FORMATS[name])


def check_pattern_size(parsed: Expression, limit: int) -> None:
    if (num_chars := expressions.size(parsed)) > limit:
        raise PatternError(f"with its repetitions written out it has {num_chars} characters; the limit is {limit}")


def _is_no_string(shape: object) -> bool:
    """Names are strings: other types in propertyNames say nothing."""
    return isinstance(shape, Number | Array | Object) or (
        isinstance(shape, Values) and not any(isinstance(value, str) for value in shape.values)
    )


def count(fields: Fields, name: str, at: str) -> int | None:
    if name not in fields:
        return None
    value = fields[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise Refusal(name, at, "must be an integer from 0 to 2147483647")
    return value


def _bound(fields: Fields, name: str, at: str) -> Bound | None:
    if name not in fields:
        return None
    return Bound(_number(fields[name], name, at), is_open=name.startswith("exclusive"))


def _number(value: Any, name: str, at: str) -> Decimal:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Refusal(name, at, "must be a number")
    return Decimal(str(value))
