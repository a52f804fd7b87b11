"""`write_schema`: settled shapes as the JSON schema that a backend compiles.

It has one form for everything: a single type or a $ref or an enum in each schema, alternatives as anyOf, formats as
patterns in the dialect of `pattern.py`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final

import orjson

from tensorweave.cluster.guide import GuideBackend
from tensorweave.router.guided import expressions
from tensorweave.router.guided.expressions import Expression
from tensorweave.router.guided.intersect import least_integer, most_integer
from tensorweave.router.guided.settle import SettledSchema
from tensorweave.router.guided.shapes import (
    Anything,
    Array,
    Bound,
    Except,
    Number,
    Object,
    Reference,
    Shape,
    Text,
    Union,
    Values,
)

_ESCAPES: Final = '"\\bfnrt'
"""Without \\u, no name can be written in two ways: else an additional property could repeat a declared one."""


def write_schema(schema: SettledSchema, backend: GuideBackend) -> str:
    return orjson.dumps(written_schema(schema, backend)).decode()


def written_schema(schema: SettledSchema, backend: GuideBackend) -> dict[str, Any]:
    writer = _Writer(list(schema.referred))
    root = writer.union(schema.root)
    if schema.referred:
        root["$defs"] = {writer.names[pointer]: writer.union(union) for pointer, union in schema.referred.items()}
    if backend == "llguidance":
        if "$ref" in root:  # which may have nothing beside it if it is recursive
            root = {"anyOf": [{"$ref": root.pop("$ref")}], **root}
        root["x-guidance"] = {"json_allowed_escapes": _ESCAPES}
    return root


class _Writer:
    def __init__(self, pointers: list[str]) -> None:
        self._written: dict[int, tuple[Expression, str]] = {}
        self.names = {pointer: f"d{i}" for i, pointer in enumerate(pointers)}

    def _anchored(self, expression: Expression) -> str:
        """Written once: expressions are large, and formats come often."""
        known = self._written.get(id(expression))
        if known is None or known[0] is not expression:
            known = self._written[id(expression)] = (expression, anchored(expression))
        return known[1]

    def union(self, union: Union) -> dict[str, Any]:
        values = [value for shape in union if isinstance(shape, Values) for value in shape.values]
        schemas = [self._shape(shape) for shape in union if not isinstance(shape, Values)]
        if {} in schemas:
            return {}
        if values:
            schemas.append({"enum": values})
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _shape(self, shape: Shape) -> dict[str, Any]:
        match shape:
            case Anything():
                return {}
            case Reference(pointer):
                return {"$ref": f"#/$defs/{self.names[pointer]}"}
            case Text():
                return self._text(shape)
            case Number():
                return _number(shape)
            case Array():
                return self._array(shape)
            case Object():
                return self._object(shape)
            case Values() | Except():
                raise AssertionError("values are written together, and exceptions are settled")

    def _text(self, text: Text) -> dict[str, Any]:
        written: dict[str, Any] = {"type": "string"}
        if text.least:
            written["minLength"] = text.least
        if text.most is not None:
            written["maxLength"] = text.most
        if text.patterns:
            written["pattern"] = self._anchored(text.patterns[0])
        if text.patterns[1:]:
            written["allOf"] = [{"pattern": self._anchored(expression)} for expression in text.patterns[1:]]
        return written

    def _array(self, array: Array) -> dict[str, Any]:
        written: dict[str, Any] = {"type": "array"}
        if array.prefix:
            written["prefixItems"] = [self.union(item) for item in array.prefix]
        written["items"] = self.union(array.rest) if array.rest else False
        if array.least:
            written["minItems"] = array.least
        if array.most is not None:
            written["maxItems"] = array.most
        return written

    def _object(self, shape: Object) -> dict[str, Any]:
        written: dict[str, Any] = {"type": "object"}
        if shape.properties:
            written["properties"] = {name: self.union(union) for name, union in shape.properties.items()}
        if shape.required:
            written["required"] = [name for name in shape.properties if name in shape.required]
        written["additionalProperties"] = self.union(shape.rest) if shape.rest else False
        if shape.patterns:
            written["patternProperties"] = {self._anchored(name): self.union(value) for name, value in shape.patterns}
        if shape.least:
            written["minProperties"] = shape.least
        if shape.most is not None:
            written["maxProperties"] = shape.most
        return written


def anchored(expression: Expression) -> str:
    return f"^(?:{expressions.write(expression)})$"


def _number(number: Number) -> dict[str, Any]:
    written: dict[str, Any] = {"type": "integer" if number.is_integer else "number"}
    if number.is_integer:
        if number.low is not None:
            written["minimum"] = least_integer(number.low)
        if number.high is not None:
            written["maximum"] = most_integer(number.high)
    else:
        written |= _open_or_closed(number.low, "minimum", "exclusiveMinimum")
        written |= _open_or_closed(number.high, "maximum", "exclusiveMaximum")
    if number.multiples:
        written["multipleOf"] = _plain(number.multiples[0])
    if number.multiples[1:]:
        written["allOf"] = [{"multipleOf": _plain(multiple)} for multiple in number.multiples[1:]]
    return written


def _open_or_closed(bound: Bound | None, closed: str, opened: str) -> dict[str, Any]:
    return {} if bound is None else {opened if bound.is_open else closed: _plain(bound.value)}


def _plain(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)
