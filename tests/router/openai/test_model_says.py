"""What the model's own files and its tokenizer say of every request: where an answer ends, and sampling fields that a
request leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tensorweave.cluster.protocol import ModelInfo, SamplingDefaults, SamplingSpec
from tensorweave.router.sampling.fields import SamplingFields
from tensorweave.router.sampling.resolution import fit_to_prompt, resolve_sampling
from tests.router.calls import CHAT, COMPLETIONS, post
from tests.router.fake_fleet import FakeLink
from tests.router.serving import IM_END, chat, completion, model_info
from tests.router.small_tokenizers import byte_level

QWEN = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
GREEDY = SamplingDefaults(temperature=0.0, repetition_penalty=1.2)


def asked(info: ModelInfo, path: str = CHAT, **fields: Any) -> SamplingSpec:
    link = FakeLink(info, script=[5, IM_END])
    body = chat(**fields) if path == CHAT else completion(**fields)
    assert post(path, body, link).status_code == 200
    return link.requests[0].sampling


# ---- ends of sequence


def test_the_tokenizers_end_is_an_end_beside_those_of_the_files() -> None:
    info = replace(model_info(), end_ids=(9, 11))
    link = FakeLink(info, script=[5, 6, IM_END, IM_END, IM_END])
    answer = post(CHAT, chat(max_tokens=5, return_token_ids=True), link).json()
    assert link.requests[0].sampling.stop_token_ids == (9, 11, IM_END)
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert choice["token_ids"] == [5, 6, IM_END]
    assert asked(info, ignore_eos=True, max_tokens=2).stop_token_ids == ()


def test_an_end_that_the_vocabulary_lacks_is_none() -> None:
    """It would be outside the logits when a request's min_tokens bans the ends."""
    info = replace(model_info(), end_ids=(0,), vocab_size=2)
    assert info.with_end_id(byte_level().eos_id) == info
    assert info.with_end_id(None) == info
    assert info.with_end_id(1).end_ids == (0, 1)
    assert info.with_end_id(0) == info


# ---- sampling defaults


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_models_defaults_hold_where_a_request_says_nothing(path: str) -> None:
    spec = asked(replace(model_info(), sampling_defaults=QWEN), path)
    assert (spec.temperature, spec.top_k, spec.top_p, spec.repetition_penalty) == (0.7, 20, 0.8, 1.05)
    spec = asked(replace(model_info(), sampling_defaults=QWEN), path, temperature=None, top_p=None)
    assert (spec.temperature, spec.top_p) == (0.7, 0.8)


def test_without_them_openais_defaults_stay() -> None:
    spec = asked(model_info())
    assert (spec.temperature, spec.top_k, spec.top_p, spec.repetition_penalty) == (1.0, 0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 1.5}, (1.5, 20, 0.8, 1.05)),
        ({"top_k": -1}, (0.7, 0, 0.8, 1.05)),
        ({"top_k": 0, "top_p": 1.0}, (0.7, 0, 1.0, 1.05)),
        ({"repetition_penalty": 1.0}, (0.7, 20, 0.8, 1.0)),
        ({"temperature": 0}, (0.0, 0, 1.0, 1.05)),
    ],
)
def test_a_requests_own_fields_win_one_by_one(fields: dict[str, Any], expected: tuple[float, ...]) -> None:
    spec = asked(replace(model_info(), sampling_defaults=QWEN), **fields)
    assert (spec.temperature, spec.top_k, spec.top_p, spec.repetition_penalty) == expected


def test_a_model_that_does_not_sample_is_greedy_unless_asked() -> None:
    info = replace(model_info(), sampling_defaults=GREEDY)
    assert asked(info).is_greedy
    assert asked(info).repetition_penalty == 1.2
    assert asked(info, temperature=0.5).temperature == 0.5


def limit(default: int | None, own: int | None, **fields: Any) -> int:
    info = replace(model_info(max_seq_len=100), sampling_defaults=SamplingDefaults(max_tokens=own))
    resolved = resolve_sampling(SamplingFields(**fields), info, default_max_tokens=default)
    spec = fit_to_prompt(resolved, 10, info, asked_tokens=fields.get("max_tokens"), caps_max_tokens=False)
    return spec.max_tokens


def test_the_models_own_bound_of_an_answer() -> None:
    assert limit(None, None) == 90
    assert limit(None, 30) == 30
    assert limit(16, 30) == 16
    assert limit(16, 8) == 8
    assert limit(None, 300) == 90
    assert limit(None, 30, max_tokens=50) == 50
    assert limit(None, 30, min_tokens=40) == 40


def test_they_survive_the_wire() -> None:
    info = replace(model_info(), sampling_defaults=QWEN)
    assert ModelInfo.from_wire(info.to_wire()) == info
    assert ModelInfo.from_wire(model_info().to_wire()) == model_info()
