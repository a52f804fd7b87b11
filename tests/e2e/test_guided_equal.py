"""Outputs that follow a grammar, from a random model at temperature 1: what ends with 'stop' has its form, and the same
seeds give the same tokens however they are served."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.cluster.speculation_config import NGramDecodingConfig
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.report_channel import open_report_channel
from tensorweave.workers.guided.guides import Guides, RankGuides
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.guided.vocabulary import TokenizerSource
from tensorweave.workers.sampling import grammar_rule
from tests.llmapi.small_llm import write_small_model
from tests.router.small_tokenizers import byte_level
from tests.workers.tiny_models import make_model
from tests.workers.transfer_drive import Answer, Gang, model_gang, run_aggregated, run_disaggregated, tcp_carriers
from tests.workers.waiting import WAIT_S

MakeGuides = Callable[[Comm], Guides]

NUM_SEEDS = 6
MAX_TOKENS = 100
CACHE = {"max_tokens": 60_000}

WORD = {"type": "string", "pattern": "^[a-z]{1,6}$"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "bc", "d"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "array", "items": WORD, "maxItems": 2}]},
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
                "required": ["left"],
                "additionalProperties": False,
            }
        },
    },
}
TAG = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": SCHEMAS["union"]}}
GUIDES: dict[str, tuple[Guide, Callable[[str], object]]] = {
    **{
        f"{name} {backend}": (
            Guide("json_schema", json.dumps(schema), backend),  # type: ignore[arg-type]
            lambda text, schema=schema: jsonschema.validate(json.loads(text), schema),
        )
        for name, schema in SCHEMAS.items()
        for backend in ("xgrammar", "llguidance")
    },
    "date": (Guide("regex", "[0-9]{4}-[01][0-9]"), lambda text: _matches("[0-9]{4}-[01][0-9]", text)),
    "list": (Guide("ebnf", 'root ::= "x" | "x," root'), lambda text: _matches("x(,x)*", text)),
    "sum": (Guide("lark", 'start: "1" ("+" "1")*', "llguidance"), lambda text: _matches(r"1(\+1)*", text)),
    "tag": (
        Guide("structural_tag", json.dumps(TAG)),
        lambda text: jsonschema.validate(json.loads(text), SCHEMAS["union"]),
    ),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"num_logprobs": 2},
    {"presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"top_p": 0.9, "top_k": 50},
    {"bad_words": ((70, 71),), "logit_bias": ((68, 2.0),)},
    {"temperature": 0.0},
]


def _matches(pattern: str, text: str) -> None:
    assert re.fullmatch(pattern, text), text


def end_id() -> int:
    end = byte_level().eos_id
    assert end is not None
    return end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("llama"))


class SharedTrials(Trials):
    """One process for all gangs of the module."""

    def close(self) -> None:
        return None

    def close_at_last(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def trials(model: Path) -> Iterator[SharedTrials]:
    trials = SharedTrials(TokenizerSource(str(model)), len(byte_level().backend))
    yield trials
    trials.close_at_last()


@pytest.fixture(scope="module")
def guides(trials: SharedTrials) -> MakeGuides:
    return lambda comm: RankGuides(comm.rank, comm.size, trials, open_report_channel(comm, "127.0.0.1"))


@pytest.fixture(scope="module")
def make_gang(model: Path, guides: MakeGuides) -> Callable[..., Gang]:
    def make(size: int = 1, make_carrier: Any = None, **knobs: Any) -> Gang:
        return model_gang(model, size, make_carrier, make_guides=guides, **{"kv_cache_config": CACHE, **knobs})

    return make


@pytest.fixture(scope="module")
def asked() -> tuple[list[list[int]], list[SamplingSpec], list[str]]:
    """Prompts, how they are sampled, and the names of their guides."""
    rng = random.Random(5)
    prompts, samplings, names = [], [], []
    for name, (guide, _) in GUIDES.items():
        for seed in range(NUM_SEEDS):
            prompts.append([rng.randrange(3, 400) for _ in range(rng.choice([1, 9, 40, 90]))])
            spec = SamplingSpec(MAX_TOKENS, temperature=1.0, seed=seed, stop_token_ids=(end_id(),), guide=guide)
            samplings.append(replace(spec, **KINDS[(seed + len(names)) % len(KINDS)]))
            names.append(name)
    return prompts, samplings, names


@pytest.fixture(scope="module")
def expected(make_gang: Callable[..., Gang], asked: Any) -> list[Answer]:
    with make_gang() as gang:
        return run_aggregated(gang, asked[0], asked[1])


def check_forms(asked: Any, answers: Sequence[Answer]) -> dict[str, set[str]]:
    """Return the texts that have ended, by guide."""
    ended: dict[str, set[str]] = {}
    for name, sampling, answer in zip(asked[2], asked[1], answers, strict=True):
        if answer.finish_reason != "stop":
            assert answer.finish_reason == "length"
            assert len(answer.tokens) == MAX_TOKENS
            continue
        assert answer.tokens[-1] == answer.stop_reason == end_id()
        text = byte_level().decode(answer.tokens[:-1], skip_special_tokens=False)
        GUIDES[name][1](text)
        ended.setdefault(name, set()).add(text)
        if sampling.num_logprobs is not None:
            assert len(answer.logprobs) == len(answer.tokens)
    return ended


def told(answers: Sequence[Answer]) -> list[Any]:
    return [(answer.tokens, answer.finish_reason, answer.stop_reason) for answer in answers]


def test_what_ends_has_its_form(asked: Any, expected: list[Answer]) -> None:
    ended = check_forms(asked, expected)
    assert ended.keys() == GUIDES.keys(), "each guide has an answer that has ended"
    assert sum(map(len, ended.values())) > 2 * len(GUIDES)


@pytest.mark.parametrize(
    "way",
    [
        {"size": 2},
        {"size": 3, "max_num_tokens": 64},
        {"max_num_tokens": 32},
        {"overlaps": True},
        {"overlaps": True, "is_on_device": True},
        {"policy": "MAX_UTILIZATION", "kv_cache_config": {"max_tokens": 384}, "size": 2},  # too few for one guide's six
        {"speculative": NGramDecodingConfig(max_draft_len=3)},
    ],
    ids=["two ranks", "three ranks", "chunks of a block", "overlap", "device", "preempted", "drafts"],
)
def test_the_same_seeds_give_the_same_tokens(
    way: dict[str, Any], make_gang: Callable[..., Gang], asked: Any, expected: list[Answer]
) -> None:
    with make_gang(**way) as gang:
        answers = run_aggregated(gang, asked[0], asked[1])
        assert told(answers) == told(expected)
        if "policy" in way:
            assert gang.leader.gauges()["num_preemptions_total"] > 0
        gang.wait_idle()


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1)], ids=["1P+1D", "2P+1D"])
def test_the_prefill_gang_chooses_the_first_token_with_the_grammar(
    sizes: tuple[int, int], make_gang: Callable[..., Gang], asked: Any, expected: list[Answer]
) -> None:
    with make_gang(sizes[0], tcp_carriers, name="P") as prefill, make_gang(sizes[1], tcp_carriers, name="D") as decode:
        assert told(run_disaggregated(prefill, decode, asked[0], asked[1])) == told(expected)


def test_a_grammar_that_is_slow_to_follow_ends_its_requests_on_all_ranks(
    make_gang: Callable[..., Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_rule, "_SLOW_S", -1.0)
    guided = SamplingSpec(200, stop_token_ids=(end_id(),), guide=Guide("regex", "[a-z]{190}"))
    with make_gang(2) as gang:
        gang.leader.enqueue_requests(
            [GenerateRequest("free", [5, 6], SamplingSpec(150)), GenerateRequest("slow", [5, 6], guided)]
        )
        ends: dict[str, Any] = {}
        while len(ends) < 2:
            chunks = gang.leader.await_responses(timeout_s=WAIT_S)
            assert chunks, "nothing comes"
            ends |= {chunk.request_id: chunk.error or chunk.finish_reason for chunk in chunks if chunk.is_last}
        assert ends["free"] == "length"
        assert "too long" in str(ends["slow"])
        with pytest.raises(RequestRejected, match="too long"):
            gang.leader.enqueue_request(GenerateRequest("again", [5, 6], guided))
        gang.wait_idle()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("overlaps", [False, True])
def test_on_a_gpu(overlaps: bool, asked: Any, guides: MakeGuides, tmp_path: Path) -> None:
    """Steps are replayed from CUDA graphs; the bits are applied between the forward's and the sampling's."""
    make_model("llama_llama3", tmp_path, vocab_size=len(byte_level().backend), eos_token_id=None)
    knobs = {"device": "cuda", "is_on_device": True, "overlaps": overlaps, "kv_cache_config": CACHE}
    with model_gang(tmp_path, 1, None, make_guides=guides, **knobs) as gang:
        assert check_forms(asked, run_aggregated(gang, asked[0], asked[1])).keys() == GUIDES.keys()
        gang.wait_idle()
