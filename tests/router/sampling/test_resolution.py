"""Sampling fields become a resolved spec, or a rejection that names the field."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorweave.cluster.errors import ContextTooLong, RequestRejected
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.router.sampling.fields import SamplingFields
from tensorweave.router.sampling.resolution import check_prompt, fit_to_prompt, nth_seed, resolve_sampling
from tests.router.serving import IM_END, model_info

VOCAB = model_info().vocab_size


def resolve(prompt_len: int = 10, **fields: Any) -> SamplingSpec:
    info, max_tokens = model_info(), fields.get("max_tokens")
    spec = resolve_sampling(SamplingFields(**fields), info, draw_seed=lambda bits: 42)
    return fit_to_prompt(spec, prompt_len, info, asked_tokens=max_tokens, caps_max_tokens=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("temperature", True), ("top_p", 1.01), ("top_p", -1), ("min_p", 2), ("top_k", -2), ("top_k", 1.0),
        ("max_tokens", 0), ("max_tokens", 2**63),
        ("min_tokens", -1), ("seed", 2**64), ("seed", "7"), ("stop", "plain string"), ("stop", [""]), ("stop", [1]),
        ("stop", ["x" * 1025]), ("stop_token_ids", ["a"]), ("stop_token_ids", [-1]), ("stop_token_ids", "12"),
        ("stop_token_ids", [1] * 1025), ("ignore_eos", 1),
        ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", "1"),
        ("frequency_penalty", math.nan), ("no_repeat_ngram_size", -1), ("no_repeat_ngram_size", 1.5),
        ("bad_token_ids", [[]]), ("bad_token_ids", [3]), ("bad_token_ids", "ab"), ("bad_token_ids", [[None]]),
        ("bad_token_ids", [[1]] * 1025), ("logit_bias", {1: 101}), ("logit_bias", {1: -100.5}),
        ("logit_bias", {1: math.nan}), ("logit_bias", {1: None}), ("logit_bias", {"1": 1.0}), ("logit_bias", {-1: 1.0}),
        ("logit_bias", [1]), ("embedding_bias", b"123"), ("embedding_bias", struct.pack("<f", math.nan)),
        ("embedding_bias", [1.0]), ("top_p_decay", 0), ("top_p_decay", 1.1), ("top_p_min", 0), ("top_p_min", 2),
        ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", 1.0),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestRejected) as refused:
        SamplingFields(**{name: value})
    assert refused.value.param == name
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("top_p_reset_ids", -1, "top_p_reset_ids"),
        ("wants_context_logits", 1, "return_context_logits"),
        ("wants_generation_logits", "yes", "return_generation_logits"),
        ("logits_processors", "name", "logits_processor"),
        ("logits_processors", [1], "logits_processor"),
        ("uses_batched_processor", 1, "apply_batched_logits_processor"),
    ],
)
def test_fields_are_named_as_people_know_them(field: str, value: Any, named: str) -> None:
    with pytest.raises(RequestRejected) as refused:
        SamplingFields(**{field: value})
    assert refused.value.param == named


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("stop_token_ids", [VOCAB], "stop_token_ids"),
        ("logit_bias", {VOCAB: 1.0}, "logit_bias"),
        ("bad_token_ids", [[1], [2, VOCAB]], "bad_token_ids"),
        ("top_p_reset_ids", VOCAB, "top_p_reset_ids"),
        ("embedding_bias", bytes(4 * VOCAB - 4), "embedding_bias"),
        ("logprobs", VOCAB + 1, "logprobs"),
        ("prompt_logprobs", VOCAB + 1, "prompt_logprobs"),
    ],
)
def test_what_does_not_fit_the_model_is_named(field: str, value: Any, named: str) -> None:
    with pytest.raises(RequestRejected) as refused:
        resolve(**{field: value})
    assert refused.value.param == named


def test_log_probabilities_are_limited_where_asked() -> None:
    ask = functools.partial(resolve_sampling, info=model_info(), max_logprobs=20)
    assert ask(SamplingFields(logprobs=20)).num_logprobs == 20
    with pytest.raises(RequestRejected, match="between 0 and 20"):
        ask(SamplingFields(prompt_logprobs=21))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_penalties_and_biases_hold_for_greedy_too(temperature: float) -> None:
    spec = resolve(
        max_tokens=4,
        temperature=temperature,
        repetition_penalty=1.2,
        presence_penalty=-2,
        frequency_penalty=0.5,
        no_repeat_ngram_size=3,
        bad_token_ids=[[1, 2], [3]],
        logit_bias={5: -100, 6: 1},
        embedding_bias=bytes(4 * VOCAB),
        logprobs=0,
        prompt_logprobs=2,
        wants_context_logits=True,
        wants_generation_logits=True,
        logits_processors=["mine"],
        uses_batched_processor=True,
    )
    assert spec.is_greedy == (temperature == 0)
    assert replace(spec, temperature=0.0, seed=0) == SamplingSpec(
        4,
        stop_token_ids=(IM_END,),
        repetition_penalty=1.2,
        presence_penalty=-2.0,
        frequency_penalty=0.5,
        no_repeat_ngram_size=3,
        bad_words=((1, 2), (3,)),
        logit_bias=((5, -100.0), (6, 1.0)),
        embedding_bias=bytes(4 * VOCAB),
        num_logprobs=0,
        num_prompt_logprobs=2,
        wants_context_logits=True,
        wants_generation_logits=True,
        logits_processors=("mine",),
        uses_batched_processor=True,
    )


def test_top_p_decays_where_it_samples() -> None:
    spec = resolve(top_p=0.9, top_p_decay=0.5, top_p_min=0.2, top_p_reset_ids=3)
    assert (spec.top_p, spec.top_p_decay, spec.top_p_min, spec.top_p_reset_ids) == (0.9, 0.5, 0.2, 3)


def test_defaults_over_http_are_openais() -> None:
    assert resolve() == SamplingSpec(max_tokens=502, temperature=1.0, top_p=1.0, seed=42, stop_token_ids=(IM_END,))


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}])
def test_greedy_spellings(greedy: dict[str, Any]) -> None:
    assert resolve(**greedy, seed=7) == SamplingSpec(max_tokens=502, stop_token_ids=(IM_END,))


def test_greedy_by_default_for_the_llm_api() -> None:
    fields = SamplingFields()
    assert resolve_sampling(fields, model_info(), default_temperature=0.0).is_greedy
    assert not resolve_sampling(SamplingFields(temperature=0.7), model_info(), default_temperature=0.0).is_greedy


def test_every_field_arrives() -> None:
    spec = resolve(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        seed=-1,
        stop_token_ids=[7, 7],
        ignore_eos=True,
    )
    assert spec == SamplingSpec(9, 2, 0.5, 40, 0.9, 0.1, 2**63 - 1, (7,))


def test_seeds_of_n_sequences_follow_each_other_within_63_bits() -> None:
    assert [nth_seed(2**63 - 1, i) for i in range(3)] == [2**63 - 1, 0, 1]


@given(
    prompt_len=st.integers(0, 700),
    max_tokens=st.none() | st.integers(1, 700) | st.just(2**63 - 1),
    default=st.none() | st.integers(1, 700),
    is_capped=st.booleans(),
)
def test_nothing_exceeds_the_context(
    prompt_len: int, max_tokens: int | None, default: int | None, is_capped: bool
) -> None:
    info = model_info()
    resolved = resolve_sampling(SamplingFields(max_tokens=max_tokens), info, default_max_tokens=default)
    resolve_it = functools.partial(
        fit_to_prompt, resolved, prompt_len, info, asked_tokens=max_tokens, caps_max_tokens=is_capped
    )
    if prompt_len > 511 or (not is_capped and prompt_len + (max_tokens or 1) > 512):
        with pytest.raises(ContextTooLong, match=rf"is 512 tokens.* {prompt_len}|is 512 tokens.*\({prompt_len} "):
            resolve_it()
        return
    spec = resolve_it()
    assert prompt_len + spec.max_tokens <= 512
    assert max_tokens is None or spec.max_tokens == min(max_tokens, 512 - prompt_len)


def test_prompts_are_checked_against_the_vocabulary() -> None:
    info = model_info()
    check_prompt([0, info.vocab_size - 1], info)
    for wrong in ([], [info.vocab_size], [-1]):
        with pytest.raises(RequestRejected) as refused:
            check_prompt(wrong, info, param="messages")
        assert refused.value.param == "messages"
    with pytest.raises(RequestRejected, match="vocabulary"):
        resolve(stop_token_ids=[info.vocab_size])
