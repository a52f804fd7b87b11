"""Negations, conditions and what arrays contain: random answers validate, and what a person would write is possible."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.matchers import accepts, answers, compact, validator

ADDRESS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"country": {"enum": ["US", "CA", "NL"]}, "code": {"type": "string"}},
    "required": ["country", "code"],
    "additionalProperties": False,
}
US: Final = {"properties": {"country": {"const": "US"}}, "required": ["country"]}
CA: Final = {"properties": {"country": {"const": "CA"}}, "required": ["country"]}
DIGITS: Final = {"properties": {"code": {"pattern": "^[0-9]{5}$"}}}
LETTERS: Final = {"properties": {"code": {"pattern": "^[A-Z]{3}$"}}}
CARD: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "card": {"type": "integer"}, "address": {"type": "string"}},
    "required": ["name"],
}
WORDS: Final = {"type": "array", "items": {"enum": ["a", "b", "c"]}}

CASES: Final[list[tuple[str, dict[str, Any], list[Any]]]] = [
    (
        "if",
        {**ADDRESS, "if": US, "then": DIGITS, "else": LETTERS},
        [{"country": "US", "code": "12345"}, {"country": "NL", "code": "ABC"}],
    ),
    (
        "several ifs",
        {**ADDRESS, "allOf": [{"if": US, "then": DIGITS}, {"if": CA, "then": LETTERS}]},
        [{"country": "US", "code": "12345"}, {"country": "CA", "code": "ABC"}, {"country": "NL", "code": "x"}],
    ),
    (
        "dependentRequired",
        {**CARD, "dependentRequired": {"card": ["address"]}},
        [{"name": "x"}, {"name": "x", "address": "y"}, {"name": "x", "card": 1, "address": "y"}],
    ),
    (
        "dependencies",
        {**CARD, "dependencies": {"card": {"required": ["address"], "properties": {"address": {"const": "home"}}}}},
        [{"name": "x", "address": "y"}, {"name": "x", "card": 1, "address": "home"}],
    ),
    (
        "not both",
        {**CARD, "not": {"required": ["card", "address"]}},
        [{"name": "x", "card": 1}, {"name": "x", "address": "y"}],
    ),
    ("not a value", {"enum": ["a", "b", 1], "not": {"enum": ["b", 2]}}, ["a", 1]),
    ("not a type", {"not": {"type": ["string", "object", "array"]}}, [1.5, None, True]),
    ("not in a range", {"type": "integer", "not": {"minimum": 3, "exclusiveMaximum": 7}}, [2, 7]),
    ("not short", {"type": "string", "maxLength": 6, "not": {"maxLength": 2}}, ["abc"]),
    (
        "not, by reference",
        {"enum": ["x", "y"], "not": {"$ref": "#/$defs/taken"}, "$defs": {"taken": {"const": "x"}}},
        ["y"],
    ),
    ("contains", {**WORDS, "maxItems": 4, "contains": {"const": "c"}}, [["c"], ["c", "a"]]),
    ("few of them", {**WORDS, "maxItems": 4, "contains": {"const": "c"}, "maxContains": 1}, [["c", "a", "b"]]),
    ("unique", {**WORDS, "uniqueItems": True}, [[], ["a"], ["c", "a"], ["b", "a", "c"]]),
    ("unique, by reference", {"$ref": "#/$defs/w", "uniqueItems": True, "$defs": {"w": WORDS}}, [["b"]]),
    ("at most one", {"type": "array", "items": {"type": "string"}, "maxItems": 1, "uniqueItems": True}, [["x"]]),
    (
        "unique, of many",
        {"type": "array", "items": {"enum": list(range(8))}, "minItems": 2, "uniqueItems": True},
        [[0, 7], [1, 2, 3]],
    ),
]


@pytest.mark.parametrize(("schema", "possible"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_answers_validate(schema: dict[str, Any], possible: list[Any]) -> None:
    guide, check = guide_for(GuideParams(json=schema)), validator(schema)
    for answer in answers(guide, range(12)):
        check.validate(json.loads(answer))
    for value in possible:
        check.validate(value)
        assert accepts(guide, compact(value)), value


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "not": {"const": "x"}}, "not"),
        ({"type": "string", "not": {"pattern": "x"}}, "not"),
        ({"type": "number", "not": {"type": "integer"}}, "not"),
        ({"type": "object", "not": {"maxProperties": 2}}, "not"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}}, "$ref"),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "if": {"properties": {"a": {"const": "x"}}},
          "then": {"required": ["b"]}}, "if"),
        ({**WORDS, "not": {"contains": {"const": "a"}}}, "contains"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": {"enum": list(range(9))}, "uniqueItems": True}, "uniqueItems"),
        ({**WORDS, "uniqueItems": 1}, "uniqueItems"),
        ({**CARD, "dependentRequired": {"card": {}}}, "dependentRequired"),
        ({**CARD, "dependentRequired": []}, "dependentRequired"),
        ({**CARD, "dependentSchemas": {"card": ["name"]}}, "dependentSchemas"),
        ({**CARD, "unevaluatedProperties": False, "not": {"required": ["card"]}}, "not"),
        ({**WORDS, "contains": {}, "minContains": -1}, "minContains"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_name(schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(RequestRejected, match=f"'{keyword.replace('$', '.')}'"):
        guide_for(GuideParams(json=schema))
