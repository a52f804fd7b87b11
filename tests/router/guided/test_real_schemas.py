"""Schemas as people send them: written by hand, by pydantic and by zod. Every answer that ends validates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import GuideBackend
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.matchers import accepts, answers, compact, validator

REAL: Final[list[dict[str, Any]]] = json.loads((Path(__file__).parent / "data" / "real_schemas.json").read_text())
NUM_SEEDS: Final = 10
MOSTLY_UNFINISHED: Final = {"unanchored_pattern"}  # a random walk seldom finds the end


def by_name(case: dict[str, Any]) -> str:
    return str(case["name"])


def test_there_are_sixty() -> None:
    assert len({case["name"] for case in REAL}) == len(REAL) >= 60


@pytest.mark.parametrize("case", REAL, ids=by_name)
def test_answers_validate(case: dict[str, Any]) -> None:
    guide, check = guide_for(GuideParams(json=case["schema"])), validator(case["schema"])
    num_done = 0
    for answer in answers(guide, range(NUM_SEEDS)):
        check.validate(json.loads(answer))
        num_done += 1
    assert num_done > NUM_SEEDS // 2 or case["name"] in MOSTLY_UNFINISHED


@pytest.mark.parametrize("case", REAL, ids=by_name)
def test_a_valid_answer_is_possible(case: dict[str, Any]) -> None:
    validator(case["schema"]).validate(case["example"])
    guide = guide_for(GuideParams(json=case["schema"]))
    assert accepts(guide, compact(case["example"]))
    assert accepts(guide, json.dumps(case["example"], ensure_ascii=False))
    assert accepts(guide, json.dumps(case["example"], ensure_ascii=False, indent=1).replace("\n ", "\n"))


@pytest.mark.parametrize("case", REAL, ids=by_name)
def test_white_space_is_bounded(case: dict[str, Any]) -> None:
    guide = guide_for(GuideParams(json=case["schema"]))
    loose = compact(case["example"]).replace(":", ":" + " " * (guide.max_whitespace + 1))
    if isinstance(case["example"], dict):
        assert not accepts(guide, loose)


@pytest.mark.parametrize("case", REAL, ids=by_name)
def test_the_compact_form_has_no_free_white_space(case: dict[str, Any]) -> None:
    guide = guide_for(GuideParams(json=case["schema"], max_whitespace=0))
    assert accepts(guide, json.dumps(case["example"], ensure_ascii=False))
    assert not accepts(guide, json.dumps(case["example"], ensure_ascii=False, indent=1)) or not isinstance(
        case["example"], dict
    )


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
@pytest.mark.parametrize("case", REAL, ids=by_name)
def test_one_backend_enforces_it_or_says_what_it_does_not(case: dict[str, Any], backend: GuideBackend) -> None:
    try:
        guide = guide_for(GuideParams(json=case["schema"]), backend, may_be_grammar=True)
    except RequestRejected as error:
        assert f"is not enforced by {backend}" in error.message  # noqa: PT017
        return
    assert guide.backend == backend
    check = validator(case["schema"])
    for answer in answers(guide, range(3)):
        check.validate(json.loads(answer))
