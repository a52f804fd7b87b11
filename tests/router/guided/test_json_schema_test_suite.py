"""The official test suite: each keyword is enforced, or refused by name; an invalid value is never accepted.

A valid value may be refused: what is generated is a part of what a schema allows (properties in the schema's order,
no undeclared ones beside declared ones, and so on, as docs/structured_output.md says). How many valid values are
accepted is counted, so that the part does not become small unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.keywords import KNOWN
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.matchers import accepts, begin, compact

SUITE: Final = Path(__file__).parent / "json_schema_test_suite"
DRAFTS: Final = ("draft2020-12", "draft7")
ENFORCED: Final = frozenset(
    [
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "boolean_schema",
        "const",
        "contains",
        "default",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "if-then-else",
        "infinite-loop-detection",
        "items",
        "maxContains",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minContains",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "propertyNames",
        "ref",
        "required",
        "type",
        "unevaluatedItems",
        "unevaluatedProperties",
    ]
)
"""Files of the suite of which schemas are enforced, not all refused."""


def cases(draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for keyword, tests in json.loads((SUITE / f"{draft}.json").read_text()).items():
        yield from ((keyword, case) for case in tests)


def guide_or_reason(schema: Any, backend: BackendChoice = "auto") -> Guide | str:
    try:
        return guide_for(GuideParams(json=schema), backend, may_be_grammar=True)
    except RequestRejected as error:
        return error.message


def is_text(value: Any) -> bool:
    """Lone surrogates cannot be written in UTF-8."""
    try:
        compact(value).encode()
    except UnicodeEncodeError:
        return False
    return True


@pytest.mark.parametrize("backend", get_args(BackendChoice))
@pytest.mark.parametrize("draft", DRAFTS)
def test_no_invalid_value_is_accepted(draft: str, backend: BackendChoice) -> None:
    wrong, enforced, num_valid, num_accepted = [], set(), 0, 0
    for keyword, case in cases(draft):
        guide = guide_or_reason(case["schema"], backend)
        if isinstance(guide, str):
            continue
        enforced.add(keyword)
        for test in case["tests"]:
            if not is_text(test["data"]):
                continue
            is_accepted = accepts(guide, compact(test["data"]))
            if is_accepted and not test["valid"]:
                wrong.append((keyword, case["description"], compact(test["data"])))
            num_valid += test["valid"]
            num_accepted += is_accepted
    assert wrong == []
    assert backend != "auto" or enforced >= {name for name in ENFORCED if (name, draft) not in _ABSENT}
    assert num_accepted > 0.55 * num_valid, "a good part of the valid values must be possible"


_ABSENT: Final = {
    ("additionalItems", "draft2020-12"),
    ("dependencies", "draft2020-12"),
    ("dependentRequired", "draft7"),
    ("dependentSchemas", "draft7"),
    ("maxContains", "draft7"),
    ("minContains", "draft7"),
    ("prefixItems", "draft7"),
    ("unevaluatedItems", "draft7"),
    ("unevaluatedProperties", "draft7"),
}


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_guide_compiles(draft: str) -> None:
    for _, case in cases(draft):
        if isinstance(guide := guide_or_reason(case["schema"]), Guide):
            begin(guide)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_refusal_names_a_keyword_of_the_schema(draft: str) -> None:
    for _, case in cases(draft):
        reason = guide_or_reason(case["schema"])
        if isinstance(reason, Guide) or "no value is valid" in reason or "is no JSON" in reason:
            continue
        named = [key for key in keys_of(case["schema"]) if f"{key!r}" in reason]
        assert named, f"{reason} for {case['schema']}"
        assert KNOWN.intersection(named) or "is no keyword" in reason


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)
