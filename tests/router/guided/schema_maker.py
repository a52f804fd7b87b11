"""Random JSON schemas that combine keywords as no person would."""

from __future__ import annotations

import random
from typing import Any, Final

PATTERNS: Final = [
    "^[a-z]{2,5}$",
    "^\\d+$",
    "foo",
    "^a",
    "z$",
    "^[^a-z]{1,3}$",
    "^(a|b)+$",
    "^\\S+$",
    "^.{2,4}$",
    "^[A-Z]{3}-\\d{4}$",
    "^\\W$",
    '^(?:x|"y")$',
    "^\\w+\\s\\w+$",
    "^a\\\\b$",
    "^[0-5][0-9](\\.[0-9]{1,3})?Z$",
]
FORMATS: Final = [
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uuid",
    "json-pointer",
]
NAMES: Final = ["a", "b", "name", "x y", "é", 'q"', "n\nl", "id", "zz"]
VALUES: Final[list[Any]] = ["a", 'b"c', 1, 2.5, None, True, [1], {"a": 1}, "x"]
TYPES: Final = ["string", "integer", "null", "object", "array", "boolean", "number"]


class SchemaMaker:
    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        made = self._any(3)
        recursive = {"anyOf": [{"$ref": "#/$defs/B"}, {"type": "null"}]}
        properties = {"v": {"type": "integer"}, "n": recursive}
        b = {"type": "object", "properties": properties, "required": ["n"], "additionalProperties": False}
        return {**made, "$defs": {"A": self._any(1), "B": b}}

    def _any(self, depth: int) -> dict[str, Any]:
        scalars = [self._string, self._number, self._enum, self._multi, self._reference, self._untyped]
        nested = [self._array, self._object, self._object, self._any_of, self._all_of, self._one_of]
        make = self._draw.choice(scalars + (nested if depth > 0 else []))
        return make(depth)

    def _below(self, depth: int) -> Any:
        plain: list[Any] = [{"type": "integer"}, {"type": "string"}, {"type": "boolean"}, True, {"type": "null"}]
        return self._any(depth - 1) if depth > 0 else self._draw.choice(plain)

    def _chance(self, probability: float) -> bool:
        return self._draw.random() < probability

    def _string(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "string"}
        if self._chance(0.3):
            made["minLength"] = self._draw.randint(0, 5)
        if self._chance(0.3):
            made["maxLength"] = self._draw.randint(made.get("minLength", 0), 9)
        if self._chance(0.3):
            made["pattern"] = self._draw.choice(PATTERNS)
        if self._chance(0.3):
            made["format"] = self._draw.choice(FORMATS)
        return made

    def _number(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": self._draw.choice(["integer", "number"])}
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if self._chance(0.3):
                made[name] = self._bound()
        if self._chance(0.2):
            made["multipleOf"] = self._draw.choice([1, 2, 3, 5, 7, 10, 0.5, 0.25, 100])
        return made

    def _bound(self) -> float:
        special = self._draw.choice([0, 1, -1, 100, 1000, 10**6, 0.5, 1e-3, -0.001, 255, 65535, 2**31 - 1])
        rounded = round(self._draw.uniform(-10, 10), self._draw.randint(0, 4))
        return self._draw.choice([self._draw.randint(-20, 20), rounded, special])

    def _array(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "array"}
        if self._chance(0.3):
            made["prefixItems"] = [self._below(depth) for _ in range(self._draw.randint(1, 3))]
        if self._chance(0.6):
            made["items"] = self._draw.choice([False, self._below(depth), self._below(depth)])
        if self._chance(0.3):
            made["minItems"] = self._draw.randint(0, 3)
        if self._chance(0.3):
            made["maxItems"] = self._draw.randint(made.get("minItems", 0), 5)
        return made

    def _object(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "object"}
        names = self._draw.sample(NAMES, self._draw.randint(0, 4))
        if names:
            made["properties"] = {name: self._below(depth) for name in names}
        if self._chance(0.5):
            made["required"] = self._draw.sample([*names, "extra"], self._draw.randint(0, len(names)))
        if self._chance(0.4):
            made["additionalProperties"] = self._draw.choice([False, True, self._below(depth)])
        if self._chance(0.12):
            made["patternProperties"] = {self._draw.choice(PATTERNS): self._below(depth)}
        if self._chance(0.12):
            kinds: list[Any] = [{"pattern": self._draw.choice(PATTERNS)}, {"enum": ["a", "b"]}, {"maxLength": 4}]
            made["propertyNames"] = self._draw.choice(kinds)
        if self._chance(0.15):
            made["minProperties"] = self._draw.randint(0, 3)
        if self._chance(0.15):
            made["maxProperties"] = self._draw.randint(0, 4)
        if self._chance(0.1):
            made["unevaluatedProperties"] = False
        return made

    def _enum(self, depth: int) -> dict[str, Any]:
        if self._chance(0.5):
            return {"const": self._draw.choice(VALUES)}
        beside: list[dict[str, Any]] = [{}, {"type": "string"}, {"minimum": 2}, {"maxLength": 1}]
        return {"enum": self._draw.sample(VALUES, self._draw.randint(1, 5)), **self._draw.choice(beside)}

    def _any_of(self, depth: int) -> dict[str, Any]:
        base = {"type": "object", "properties": {"t": {"const": 1}}, "required": ["t"]}
        beside: list[dict[str, Any]] = [{}, {}, base, {"minLength": 1}, {"type": ["string", "integer"]}]
        return {"anyOf": self._branches(depth), **self._draw.choice(beside)}

    def _one_of(self, depth: int) -> dict[str, Any]:
        return {"oneOf": self._branches(depth)}

    def _all_of(self, depth: int) -> dict[str, Any]:
        beside: list[dict[str, Any]] = [
            {},
            {"type": "object"},
            {"properties": {"p": {"type": "string"}}},
            {"unevaluatedProperties": False},
        ]
        return {"allOf": self._branches(depth)[:2], **self._draw.choice(beside)}

    def _branches(self, depth: int) -> list[Any]:
        return [self._below(depth) for _ in range(self._draw.randint(1, 3))]

    def _multi(self, depth: int) -> dict[str, Any]:
        return {"type": self._draw.sample(TYPES, 2), "minLength": 1, "maximum": 9, "maxItems": 2}

    def _reference(self, depth: int) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [
            {"$ref": "#/$defs/A"},
            {"$ref": "#/$defs/B"},
            {"$ref": "#"},
            {"$ref": "#/$defs/A", "minLength": 2},
            {"$ref": "#/$defs/B", "required": ["v"]},
        ]
        return self._draw.choice(kinds)

    def _untyped(self, depth: int) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [
            {},
            {"minLength": 2},
            {"minimum": 3},
            {"properties": {"a": {"type": "null"}}},
            {"items": {"type": "integer"}},
            {"required": ["r"]},
        ]
        return self._draw.choice(kinds)
