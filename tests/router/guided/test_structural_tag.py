"""Schemas and expressions within structural tags are checked as those alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.matchers import accepts

THINK = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}


def tagged(*elements: dict[str, Any]) -> Guide:
    form = {"type": "sequence", "elements": list(elements)}
    return guide_for(GuideParams(structural_tag={"type": "structural_tag", "format": form}))


def json_of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema, **more}


def test_reasoning_and_then_json() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    guide = tagged(THINK, json_of(schema))
    assert accepts(guide, '<think>well {"a": "x"}</think>{"a": 1}')
    assert accepts(guide, '<think></think>{ "a": 1 }')
    assert not accepts(guide, '<think></think>{"a": 1, "b": 2}')
    assert not accepts(guide, '<think></think>{"a":' + " " * 9 + "1}")


def test_expressions_become_a_grammar() -> None:
    schema = {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}\\d+$"},
            "n": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 20},
        },
        "required": ["day"],
        "additionalProperties": {"type": "string"},
    }
    guide = tagged(THINK, json_of(schema))
    assert json.loads(guide.text)["format"]["elements"][1]["type"] == "grammar"
    for good in ('{"day": "2024-02-29", "code": "AB1", "n": 19.99, "x": "y"}', '{"day":"2024-01-01"}'):
        assert accepts(guide, f"<think></think>{good}")
    for bad in (
        '{"day": "2023-02-29"}',
        '{"code": "AB1"}',
        '{"day": "2024-01-01", "n": 20}',
        '{"day": "2024-01-01", "n": -1.51}',
        '{"day": "2024-01-01", "code": "x", "code": "AB1"}',
        '{"day": "2024-01-01", "d\\u0061y": "x"}',
    ):
        assert not accepts(guide, f"<think></think>{bad}"), bad


def test_only_who_says_so_gets_a_grammar() -> None:
    params = GuideParams(json={"type": "string", "format": "date"})
    assert guide_for(params, "xgrammar", may_be_grammar=True).kind == "ebnf"
    assert guide_for(params, "auto", may_be_grammar=True).backend == "llguidance"
    with pytest.raises(RequestRejected, match="is not enforced by xgrammar"):
        guide_for(params, "xgrammar")


def test_expressions_are_written_in_the_dialect() -> None:
    guide = tagged({"type": "regex", "pattern": "^(?:a.c)?b$"})
    assert accepts(guide, "axcb")
    assert not accepts(guide, "acb")


BAD: list[tuple[dict[str, Any], str]] = [
    (json_of({"properties": {"t": {"uniqueItems": True}}}), "'uniqueItems' at '/format/elements/0/json_schema/prop"),
    (json_of({"type": "string", "maxLength": 5}), "'maxLength'.* is not enforced by xgrammar"),
    (json_of({"type": "string", "format": "date"}, style="qwen_xml"), "'format'.* is not enforced by xgrammar"),
    (json_of({}, any_order=True), "any_order"),
    ({"type": "regex", "pattern": "(?=a)"}, "lookahead"),
    ({"type": "regex", "pattern": 5}, "pattern"),
    ({"type": "no_such"}, "'no_such', which is no kind of format"),
    ({"type": "json_schema", "json_schema": {}, "extra": 1}, "'extra'.* no field of a json_schema"),
    ({"type": "sequence", "elements": 3}, "must be a list"),
    ({"type": "dispatch", "rules": [["a"]]}, "pairs"),
]


@pytest.mark.parametrize(("form", "reason"), BAD, ids=[reason[:30] for _, reason in BAD])
def test_what_is_wrong_is_named(form: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestRejected, match=reason):
        tagged(form)


@pytest.mark.parametrize(
    "tag", [[], {}, "{", {"structures": [], "triggers": []}, {"structures": [{}], "triggers": ["a"]}]
)
def test_what_is_no_tag(tag: Any) -> None:
    with pytest.raises(RequestRejected):
        guide_for(GuideParams(structural_tag=tag))


def test_llguidance_alone_has_no_tags() -> None:
    with pytest.raises(RequestRejected, match="need the backend xgrammar"):
        guide_for(GuideParams(structural_tag={"format": {"type": "any_text"}}), "llguidance")
