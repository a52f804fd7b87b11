"""The two phases of one request, sent to two LLMs by hand: the same tokens as from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, CacheTransceiverConfig, DisaggregatedParams, RequestOutput, SamplingParams
from tensorweave.llmapi.engine import LocalEngine
from tests.llmapi.small_llm import CACHE, one

LONG = "The capital of France is a city on a river, and its name is known. " * 8


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[tuple[LLM, LLM]]:
    made = [
        LLM(
            directory,
            dtype="float32",
            kv_cache_config=CACHE,
            max_num_tokens=64,
            cache_transceiver_config=CacheTransceiverConfig(backend="DEFAULT"),
        )
        for _ in range(2)
    ]
    yield made[0], made[1]
    for llm in made:
        llm.shutdown()


@pytest.fixture(scope="module")
def alone(directory: Path) -> Iterator[LLM]:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as made:
        yield made


def by_hand(pair: tuple[LLM, LLM], prompt: Any, params: SamplingParams) -> RequestOutput:
    """The generation phase's output."""
    first = one(pair[0].generate(prompt, params, disaggregated_params=DisaggregatedParams(request_type="context_only")))
    assert first.outputs[0].finish_reason == "not_finished"
    assert first.outputs[0].length == 1
    phase = first.outputs[0].disaggregated_params
    assert phase is not None
    assert list(phase.first_gen_tokens or ()) == first.outputs[0].token_ids
    phase.request_type = "generation_only"
    return one(pair[1].generate(prompt, params, disaggregated_params=phase))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=20, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=1.1, top_k=40, seed=7),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=30, temperature=0.9, seed=3, stop=["e", "a"], min_tokens=3),
        SamplingParams(
            max_tokens=9,
            temperature=1.2,
            seed=5,
            repetition_penalty=1.3,
            presence_penalty=0.7,
            no_repeat_ngram_size=3,
            top_p=0.95,
            top_p_decay=0.9,
            bad_token_ids=[[60, 61], [70]],
            logprobs=2,
            return_generation_logits=True,
            ignore_eos=True,
        ),
    ],
    ids=["greedy", "sampled", "one", "stop", "told"],
)
@pytest.mark.parametrize("prompt", ["F", "The capital of", LONG], ids=["1", "short", "long"])
def test_two_llms_say_what_one_says(pair: tuple[LLM, LLM], alone: LLM, prompt: str, params: SamplingParams) -> None:
    expected = one(alone.generate(prompt, params)).outputs[0]
    answer = by_hand(pair, prompt, params).outputs[0]
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.finish_reason == expected.finish_reason
    assert answer.stop_reason == expected.stop_reason
    assert [list(entry) for entry in answer.logprobs] == [list(entry) for entry in expected.logprobs]
    assert answer.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
    if params.return_generation_logits:
        assert answer.generation_logits is not None
        assert expected.generation_logits is not None
        assert answer.generation_logits.shape == expected.generation_logits.shape
        assert float((answer.generation_logits - expected.generation_logits).abs().max()) < 1e-3


def test_both_phases_sample_alike_without_a_seed(pair: tuple[LLM, LLM]) -> None:
    """The seed that was drawn for the first phase is handed over with its state."""
    params = SamplingParams(max_tokens=12, temperature=1.5)
    first = one(pair[0].generate(LONG, params, disaggregated_params=DisaggregatedParams(request_type="context_only")))
    phase = first.outputs[0].disaggregated_params
    assert phase is not None
    again = dataclasses.replace(phase, request_type="generation_only")
    answers = [one(pair[1].generate(LONG, params, disaggregated_params=again)).outputs[0].token_ids for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0][:1] == first.outputs[0].token_ids


def test_the_kv_is_fetched_not_computed(pair: tuple[LLM, LLM]) -> None:
    """Unless the KV's connection timed out meanwhile, as on a machine that is suspended for 3 s."""
    for first in range(3, 8):
        prompt = [first + n % 50 for n in range(900)]
        pair[1].get_stats()
        before = num_lost(pair[1])
        by_hand(pair, prompt, SamplingParams(max_tokens=3, ignore_eos=True))
        computed = sum(row["inflightBatchingStats"]["numCtxTokens"] for row in pair[1].get_stats())
        if num_lost(pair[1]) == before:
            break
    assert computed < 64, "the generation phase computed the prompt itself"


def num_lost(llm: LLM) -> float:
    engine = llm._runtime.engine
    assert isinstance(engine, LocalEngine)
    return engine.executor.gauges()["kv_transfer_failures_peer_lost_total"]


def test_an_llm_says_where_its_kv_is(pair: tuple[LLM, LLM], alone: LLM) -> None:
    mine, other = pair[0].disaggregated_params, pair[1].disaggregated_params
    assert mine["backend"] == "DEFAULT"
    assert mine["fingerprint"] == other["fingerprint"]
    assert mine["endpoints"] != other["endpoints"]
    assert alone.disaggregated_params == {}


@pytest.mark.parametrize(
    ("phase", "complaint"),
    [
        (DisaggregatedParams(request_type="generation_only", first_gen_tokens=[5]), "opaque_state"),
        (
            DisaggregatedParams(request_type="generation_only", first_gen_tokens=[5], opaque_state=b"junk"),
            "opaque_state",
        ),
        (DisaggregatedParams(request_type="generation_only", opaque_state=b"junk"), "first_gen_tokens"),
        (DisaggregatedParams(request_type="context_only", draft_tokens=[1]), "draft_tokens"),
    ],
)
def test_a_wrong_phase_is_refused(pair: tuple[LLM, LLM], phase: DisaggregatedParams, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        pair[1].generate("x", SamplingParams(), disaggregated_params=phase)


@pytest.mark.parametrize(
    ("request_type", "fields", "complaint"),
    [
        ("context_only", {"n": 2, "temperature": 1.0}, "n and best_of must be 1"),
        ("generation_only", {"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_what_one_phase_cannot_tell_is_refused(
    pair: tuple[LLM, LLM], request_type: str, fields: dict[str, Any], complaint: str
) -> None:
    phase = DisaggregatedParams(request_type=request_type, first_gen_tokens=[5], opaque_state=b"junk")
    with pytest.raises(ValueError, match=complaint):
        pair[1].generate("x", SamplingParams(**fields), disaggregated_params=phase)


def test_a_wrong_type_and_a_missing_transceiver_are_refused(alone: LLM) -> None:
    with pytest.raises(ValueError, match="request_type is 'prefill'"):
        DisaggregatedParams(request_type="prefill")
    assert DisaggregatedParams(request_type="Context_Only").is_context_only
    with pytest.raises(ValueError, match="cache_transceiver_config"):
        alone.generate("x", disaggregated_params=DisaggregatedParams(request_type="context_only"))
    whole = DisaggregatedParams(request_type="context_and_generation")
    assert one(alone.generate("x", SamplingParams(max_tokens=2), disaggregated_params=whole)).outputs[0].length == 2
