"""Whatever is sent as a schema, an expression or a tag: a guide, or a RequestRejected that is short."""

from __future__ import annotations

import copy
import json
import random
from typing import Any, Final

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide
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
        attempt(GuideParams(structural_tag={"format": {"type": value}}))
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


@pytest.mark.parametrize("backend", ["auto", "xgrammar", "llguidance"])
@pytest.mark.parametrize(("num_names", "num_chars"), [(1, 128), (1, 129), (1, 60_000), (500, 100)])
def test_long_names_beside_others(backend: BackendChoice, num_names: int, num_chars: int) -> None:
    """A grammar has a rule for each of their characters."""
    names = [f"{i:03}" + "x" * (num_chars - 3) for i in range(num_names)]
    schema = {"properties": {name: {"pattern": "^a$"} for name in names}, "additionalProperties": {"type": "integer"}}
    if backend == "xgrammar" and num_names * num_chars > 128:
        with pytest.raises(RequestRejected, match="beside names of more than 128 characters"):
            guide_for(GuideParams(json=schema), backend, may_be_grammar=True)
    else:
        assert guide_for(GuideParams(json=schema), backend, may_be_grammar=True)


def test_values_that_are_far_from_a_multiple() -> None:
    for value, multiple, is_possible in ((1e300, 1e-5, True), (1e22, 3, False), (0.3, 0.1, True)):
        params = GuideParams(json={"type": "number", "enum": [value, 0.05], "multipleOf": multiple})
        if is_possible:
            assert json.loads(guide_for(params).text)["enum"][0] == value
        else:
            with pytest.raises(RequestRejected, match="no value is valid"):
                guide_for(params)
