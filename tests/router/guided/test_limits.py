"""What is too large, too deep or has too many alternatives is refused, and quickly."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.params import GuideParams

CPU_S = 1.0
"""More processor time of this thread than any refusal takes, on any machine that runs the tests."""


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def wide_union(branches: int, levels: int) -> dict[str, Any]:
    """Every combination of branches would be an alternative."""
    parts = [
        {"anyOf": [{"properties": {f"p{level}_{i}": {"const": i}}} for i in range(branches)]} for level in range(levels)
    ]
    return {"type": "object", "allOf": parts}


def growing_references(count: int) -> dict[str, Any]:
    """Each definition has the one before twice."""
    defs: dict[str, Any] = {"d0": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for i in range(1, count):
        below = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {"anyOf": [{"allOf": [below, below]}, {"allOf": [below, {"required": ["a"]}]}]}
    return {"$ref": f"#/$defs/d{count - 1}", "minProperties": 0, "$defs": defs}


BOMBS: list[tuple[str, GuideParams, str]] = [
    ("1 MB", GuideParams(json={"enum": ["x" * 1000] * 1000}), "bytes; the limit is 65536"),
    ("1 MB of text", GuideParams(json='{"description": "' + "x" * 2**20 + '"}'), "bytes; the limit is 65536"),
    ("100 deep", GuideParams(json=nested(100)), "levels deep; the limit is 64"),
    ("1,000 deep as text", GuideParams(json='{"items":' * 1000 + "{}" + "}" * 1000), "1001 levels deep"),
    ("product of unions", GuideParams(json=wide_union(10, 8)), "more than 16384 alternatives"),
    ("many branches", GuideParams(json={"oneOf": [{"const": i} for i in range(300)]}), "more than 16384 alternatives"),
    (
        "two large lists",
        GuideParams(json={"oneOf": [{"enum": list(range(0, 9000, 2))}, {"enum": list(range(1, 9000, 2))}]}),
        "",
    ),
    (
        "large classes",
        GuideParams(json={"properties": {f"f{i}": {"pattern": f"^\\W{{{i}}}$"} for i in range(1, 300)}}),
        "as a guide it has",
    ),
    ("classes in a class", GuideParams(regex="[" + "\\W" * 30_000 + "]"), "too many classes"),
    ("groups with anchors", GuideParams(regex="(|$)" * 15_000), "in too many groups"),
    ("long groups with anchors", GuideParams(regex="x" * 30_000 + "(" + "a|" * 10_000 + "$)"), "too large"),
    ("growing references", GuideParams(json=growing_references(60)), "is combined with another"),
    ("repetition", GuideParams(json={"type": "string", "pattern": "^((a{100}){100}){100}$"}), "the limit is 10000"),
    ("regex", GuideParams(regex="(([a-z]{1,100}){1,100}){1,100}"), "the limit is 10000"),
    ("long regex", GuideParams(regex="a" * 70_000), "bytes; the limit is 65536"),
    ("grammar", GuideParams(grammar='root ::= "' + "a" * 70_000 + '"'), "bytes; the limit is 65536"),
    ("choices", GuideParams(choice=["ab" * 100] * 400), "bytes; the limit is 65536"),
    ("tag", GuideParams(structural_tag={"format": nested(200)}), "levels deep; the limit is 128"),
    ("recursion", GuideParams(json={"$ref": "#"}), "refers to itself"),
    ("recursive allOf", GuideParams(json={"properties": {"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}}), ""),
    ("endless", GuideParams(json={"properties": {"a": {"$ref": "#"}}, "required": ["a"]}), "no value is valid"),
]


@pytest.mark.parametrize(("params", "reason"), [bomb[1:] for bomb in BOMBS], ids=[bomb[0] for bomb in BOMBS])
def test_what_is_too_much_is_refused_quickly(params: GuideParams, reason: str) -> None:
    began_s = time.thread_time()  # what threads of earlier tests do does not count
    if reason:
        with pytest.raises(RequestRejected, match=reason):
            guide_for(params)
    else:
        guide_for(params)
    assert time.thread_time() - began_s < CPU_S


def test_limits_can_be_raised_and_lowered() -> None:
    loose = GuidedLimits(max_bytes=2**21, max_depth=120, max_pattern_size=10**6, max_whitespace=2)
    assert guide_for(GuideParams(json={"enum": ["x" * 1000] * 200}), limits=loose).max_whitespace == 2
    guide_for(GuideParams(json=nested(50)), limits=loose)
    guide_for(GuideParams(json={"type": "string", "pattern": "^(a{100}){200}$"}), limits=loose)
    with pytest.raises(RequestRejected, match="the limit is 10"):
        guide_for(GuideParams(json=nested(20)), limits=GuidedLimits(max_depth=10))
    assert GuidedLimits.from_wire(loose.to_wire()) == loose


def test_white_space_that_a_request_asks_for_is_within_the_limit() -> None:
    limits = GuidedLimits(max_whitespace=4)
    asked = [guide_for(GuideParams(json={}, max_whitespace=n), limits=limits).max_whitespace for n in (0, 3, 100)]
    assert asked == [0, 3, 4]


def test_exactly_one_kind() -> None:
    for params in (GuideParams(), GuideParams(json={}, regex="a"), GuideParams(json_object=True, choice=["a"])):
        with pytest.raises(RequestRejected, match="exactly one"):
            guide_for(params)
    assert json.loads(guide_for(GuideParams(json=True)).text) == {}
    with pytest.raises(RequestRejected, match="no value is valid"):
        guide_for(GuideParams(json=False))


def test_no_backend_no_guides() -> None:
    with pytest.raises(RequestRejected, match="guided_decoding_backend"):
        guide_for(GuideParams(regex="a"), None)


@pytest.mark.parametrize("char", ["\x00", "\x1f", "\x7f"])
def test_constants_with_control_characters_are_not_for_llguidance(char: str) -> None:
    """It would leave them out."""
    for schema in ({"const": f"a{char}"}, {"enum": [{"k": [char]}]}, {"properties": {char: {}}}):
        assert guide_for(GuideParams(json=schema)).backend == "xgrammar"
        with pytest.raises(RequestRejected, match="with control characters is not enforced by llguidance"):
            guide_for(GuideParams(json=schema), "llguidance")
