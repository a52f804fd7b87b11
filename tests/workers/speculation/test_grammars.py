"""Requests that follow a grammar get the same tokens with drafts: a matcher sees accepted tokens alone."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.cluster.guide import Guide
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.fakes.fake_engine import HashEngine
from tensorweave.workers.guided.guides import NoGuides
from tensorweave.workers.step.grammar import Grammar
from tensorweave.workers.step.hold import Put
from tests.workers.guided.vocabularies import SIZE, compile_guide, end_id
from tests.workers.speculation.drafted_run import DraftedRun, guesses, ngram_config, recording, told, user_config

GUIDES = [
    Guide("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
    Guide("regex", "(ab|cd|x){4,20}"),
    Guide("lark", 'start: "a" ("b" | "cc")*', backend="llguidance"),
]


class ReadyGuides(NoGuides):
    """Grammars that are compiled when their requests arrive."""

    def admit(self, request: GenerateRequest, put: Put) -> None:
        put(request, ())

    def grammar_of(self, guide: Guide) -> Grammar:
        return compile_guide(guide)


def run_guided(requests: list[GenerateRequest], config: Any) -> tuple[dict[str, Any], dict[int, list[int]]]:
    run = DraftedRun(HashEngine(SIZE, 400, 16), config, guides=ReadyGuides())
    answers = run.answer(requests)
    run.close()
    return {name: told(chunks) for name, chunks in answers.items()}, recording(requests, answers)


@pytest.mark.parametrize("drafter", ["ngram", "right", "wrong", "mixed", "anything"])
def test_grammars_give_what_they_give_without_drafts(drafter: str) -> None:
    """Greedy and random; the matcher of a request sees accepted tokens alone, and its answer ends with the grammar."""
    requests = [
        GenerateRequest(f"{guide.kind}-{i}-{len(fields)}", [5, 6, 7] * (i + 1), SamplingSpec(40, guide=guide, **fields))
        for i, guide in enumerate(GUIDES * 2)
        for fields in ({"stop_token_ids": (end_id(),)}, {"stop_token_ids": (end_id(),), "temperature": 1.0, "seed": i})
    ]
    want, recorded = run_guided(requests, None)
    config = ngram_config() if drafter == "ngram" else user_config(guesses(recorded, SIZE)[drafter])
    got, _ = run_guided(requests, config)
    assert got == want
    assert any(finish_reason == "stop" for *_, finish_reason, _, _ in got.values())
