"""What the router writes for schemas as people send them, compiled and matched by the workers over tokens of several
bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.matchers import validator
from tests.workers.guided.vocabularies import compile_guide, end_id, text_of, tokens_of, write_answer

SCHEMAS: Final = Path(__file__).parents[2] / "router" / "guided" / "data" / "real_schemas.json"
REAL: Final[list[dict[str, Any]]] = json.loads(SCHEMAS.read_text())


@pytest.mark.parametrize("case", REAL, ids=lambda case: str(case["name"]))
def test_answers_validate(case: dict[str, Any]) -> None:
    grammar = compile_guide(guide_for(GuideParams(json=case["schema"])))
    for seed in range(3):
        answer = write_answer(grammar, seed)
        if answer is not None:
            validator(case["schema"]).validate(json.loads(text_of(answer)))


@pytest.mark.parametrize("case", REAL, ids=lambda case: str(case["name"]))
def test_an_example_is_accepted(case: dict[str, Any]) -> None:
    matcher = compile_guide(guide_for(GuideParams(json=case["schema"]))).matcher((end_id(),))
    assert matcher.accept([*tokens_of(json.dumps(case["example"], ensure_ascii=False)), end_id()])
