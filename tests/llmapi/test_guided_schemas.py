"""Schemas as people send them, through the engine on random weights: what ends validates, and nothing is blank."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

from tensorweave import LLM, GuidedDecodingParams, KvCacheConfig, SamplingParams
from tests.router.guided.matchers import validator

SCHEMAS: Final = Path(__file__).parent.parent / "router" / "guided" / "data" / "real_schemas.json"
REAL: Final[list[dict[str, Any]]] = json.loads(SCHEMAS.read_text())
NUM_SEEDS: Final = 2
MAX_TOKENS: Final = 160


def asks(schema: Any, seed: int) -> SamplingParams:
    guide = GuidedDecodingParams(json=json.dumps(schema))
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, guided_decoding=guide)


@pytest.mark.no_cover
def test_every_answer_that_ends_validates(directory: Path) -> None:
    """Random weights seldom end a string, so not all answers end within so few tokens."""
    cases = [(case, seed) for case in REAL for seed in range(NUM_SEEDS)]
    with LLM(directory, dtype="float32", kv_cache_config=KvCacheConfig(max_tokens=32768)) as llm:
        params = [asks(case["schema"], seed) for case, seed in cases]
        outputs = llm.generate(["Answer in JSON: "] * len(cases), params, use_tqdm=False)
    assert isinstance(outputs, list)
    done = set()
    for (case, _), output in zip(cases, outputs, strict=True):
        answer = output.outputs[0]
        assert not re.search(r"\s{20}", re.sub(r'"(?:[^"\\]|\\.)*"?', "", answer.text)), answer.text
        if answer.finish_reason == "stop":
            validator(case["schema"]).validate(json.loads(answer.text))
            done.add(case["name"])
        else:
            assert answer.finish_reason == "length"
    assert len(done) > len(REAL) // 2
