"""Whatever is sent as a schema, an expression or a tag: a guide, or a RequestRejected that is short."""

from __future__ import annotations

import copy
import json
import random
from typing import Any, Final

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.keywords import KNOWN
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.schema_maker import SchemaMaker

ODD: Final[list[Any]] = [
    None, True, False, 0, -1, 1.5, 1e308, 2**63, 2**64 - 1, "", "x", "#", "#/", "#/x/0", "\ud800", "(", "^", [], [[]],
    [None], ["x"], ["x", "x"], {}, {"": {}}, {"a": None}, [{}], {"$ref": "#"}, "string", ["string"], "object",
]  # fmt: skip


def attempt(params: GuideParams) -> None:
    try:
        assert isinstance(guide_for(params), Guide)
    except RequestRejected as error:
        assert len(error.message) < 2000  # noqa: PT017


def containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(found for item in inner for found in containers(item) if isinstance(found, dict | list))]


@pytest.mark.parametrize("keyword", sorted(KNOWN))
def test_every_keyword_with_odd_values(keyword: str) -> None:
    for value in ODD:
        attempt(GuideParams(json={keyword: value}))
        for kind in ("string", "integer", "object", "array"):
            attempt(GuideParams(json={"type": kind, keyword: value}))
        attempt(GuideParams(json={"allOf": [{keyword: value}], "anyOf": [{keyword: value}, {}]}))


def test_schemas_with_something_odd_in_them() -> None:
    for seed in range(1500):
        draw = random.Random(seed)
        schema = copy.deepcopy(SchemaMaker(seed).schema())
        for _ in range(draw.randint(1, 3)):
            place = draw.choice(containers(schema))
            if isinstance(place, dict):
                place[draw.choice([*sorted(KNOWN), *place])] = copy.deepcopy(draw.choice(ODD))
            elif place:
                place[draw.randrange(len(place))] = copy.deepcopy(draw.choice(ODD))
        attempt(GuideParams(json=schema))


@pytest.mark.parametrize("value", [value for value in ODD if value is not None], ids=repr)
def test_odd_values_instead_of_a_schema(value: Any) -> None:
    attempt(GuideParams(json=value))
    attempt(GuideParams(structural_tag=value))
    attempt(GuideParams(structural_tag={"format": value}))
    for kind in ("json_schema", "regex", "tag", "sequence", "triggered_tags", "dispatch", "grammar"):
        for name in ("json_schema", "pattern", "content", "elements", "tags", "rules", "grammar"):
            attempt(GuideParams(structural_tag={"format": {"type": kind, name: value}}))
    if isinstance(value, list):
        attempt(GuideParams(choice=value))


def test_any_text_as_an_expression() -> None:
    letters = [
        "a",
        "b",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "|",
        "*",
        "+",
        "?",
        "^",
        "$",
        "\\",
        "-",
        ",",
        "1",
        ":",
        "é",
        "=",
        "!",
        "<",
    ]
    for seed in range(20_000):
        draw = random.Random(seed)
        attempt(GuideParams(regex="".join(draw.choices(letters, k=draw.randint(1, 12)))))


def test_any_text_as_json() -> None:
    for text in ("", "{", "[]", "null", '"x"', "NaN", '{"a":1,}', "\ud800", json.dumps("x" * 100_000)):
        attempt(GuideParams(json=text))
        attempt(GuideParams(structural_tag=text))
