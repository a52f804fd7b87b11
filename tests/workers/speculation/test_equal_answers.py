"""Whatever is drafted, the answers are those of one token per step, bit by bit: tokens, log-probabilities, reasons."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tests.workers.engine_drive import engine_args, random_prompts
from tests.workers.speculation.drafted_run import (
    DraftedRun,
    guesses,
    ngram_config,
    recording,
    tokens_of,
    told,
    user_config,
)
from tests.workers.tiny_models import VOCAB, make_model

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
STOPS = tuple(range(3, VOCAB, 40))
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "random": {"temperature": 1.0, "seed": 5},
    "limited": {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.02, "seed": 6},
    "repetition penalty": {"repetition_penalty": 1.3},
    "presence and frequency": {"temperature": 0.7, "presence_penalty": 0.4, "frequency_penalty": 0.2, "seed": 7},
    "no repeated n-gram": {"no_repeat_ngram_size": 3},
    "bad words": {"bad_words": ((1, 2), (3,), (7, 8, 9))},
    "biases": {"logit_bias": ((4, 5.0), (9, -100.0)), "temperature": 0.5, "seed": 8},
    "stop tokens": {"stop_token_ids": STOPS, "temperature": 0.8, "seed": 9},
    "stop tokens, at least some": {"stop_token_ids": STOPS, "min_tokens": 9, "temperature": 0.8, "seed": 10},
    "decaying top-p": {"temperature": 1.0, "top_p": 0.9, "top_p_decay": 0.9, "top_p_min": 0.3, "seed": 11},
    "log-probabilities": {"num_logprobs": 3, "num_prompt_logprobs": 1},
    "random log-probabilities": {"num_logprobs": 0, "temperature": 1.0, "seed": 12},
    "logits": {"wants_generation_logits": True, "wants_context_logits": True},
    "processor": {"logits_processors": ("odd",), "temperature": 1.0, "seed": 13},
}
DRAFTERS = ["ngram", "right", "wrong", "mixed", "anything"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked": {"max_num_tokens": 19},
    "few at a time": {"max_batch_size": 3},
    "preempted": {"policy": "MAX_UTILIZATION", "max_batch_size": 8, "max_num_tokens": 40},
}


def odd(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: object, client_id: object) -> None:
    """A user's processor that looks at all tokens."""
    logits[..., sum(token_ids[0]) % VOCAB] += 3.0


def all_features(max_tokens: int = 24) -> list[GenerateRequest]:
    """Prompts that repeat themselves, so that n-grams are found."""
    prompts = random_prompts(len(FEATURES), 20, seed=4, vocab=VOCAB)
    return [
        GenerateRequest(name, prompt * 3, SamplingSpec(max_tokens, **fields), answer_every=1 + i % 2 * 7)
        for i, (prompt, (name, fields)) in enumerate(zip(prompts, FEATURES.items(), strict=True))
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", path, head_dim=32)  # what the native kernels take: rows have the same bits in any batch
    return path


def run_model(model: Path, requests: list[GenerateRequest], config: Any, **knobs: Any) -> tuple[dict[str, Any], Any]:
    max_tokens = 160 if knobs.get("policy") else 16384
    engine = load_engine(engine_args(model, kv_cache_config={"max_tokens": max_tokens}), SoloComm())
    run = DraftedRun(engine, config, **knobs)
    run.executor.set_logits_processor("odd", odd)
    answers = run.answer(requests)
    run.close()
    return {name: told(chunks) for name, chunks in answers.items()}, (run, recording(requests, answers))


@pytest.fixture(scope="module")
def plain(model: Path) -> Any:
    return run_model(model, all_features(), None)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_feature_gives_what_it_gives_without_drafts(drafter: str, schedule: str, model: Path, plain: Any) -> None:
    want, (_, recorded) = plain
    config = ngram_config() if drafter == "ngram" else user_config(guesses(recorded, VOCAB)[drafter])
    got, (run, _) = run_model(model, all_features(), config, **SCHEDULES[schedule])
    assert got == want
    assert any(batch.drafts for batch in run.batches)
    if schedule == "preempted":
        assert run.num_preemptions
    if drafter == "right":
        assert run.num_accepted > len(want)


@pytest.mark.no_cover
@pytest.mark.parametrize("num_requests", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("drafter", ["ngram", "mixed"])
def test_any_mixture_of_features_in_batches_of_any_size(num_requests: int, drafter: str, model: Path) -> None:
    """Features are combined at random, and every third request is one of several sequences of the same prompt."""
    rng = random.Random(num_requests)
    requests: list[GenerateRequest] = []
    for i in range(num_requests):
        chosen = [fields for fields in FEATURES.values() if "processors" not in str(fields) and rng.random() < 0.25]
        fields = {name: value for each in chosen for name, value in each.items()} | {"seed": rng.randrange(1 << 40)}
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] * rng.randint(1, 4)
        if i % 3 == 2:
            prompt = list(requests[-1].prompt_token_ids)
        requests.append(GenerateRequest(f"r{i}", prompt, SamplingSpec(rng.randint(1, 30), **fields)))
    want, (_, recorded) = run_model(model, requests, None)
    config = ngram_config(max_draft_len=4) if drafter == "ngram" else user_config(guesses(recorded, VOCAB)[drafter])
    got, (run, _) = run_model(model, requests, config, max_num_tokens=rng.choice([32, 256]))
    assert got == want
    if drafter == "mixed" and num_requests > 1:
        assert run.num_accepted


ON_DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


def run_on_device(model: Path, device: str, config: Any, **knobs: Any) -> tuple[dict[str, Any], Any]:
    """Tokens alone: there the bits of logits depend on the number of rows."""
    max_tokens = 160 if knobs.get("policy") else 16384
    args = engine_args(model, device=device, kv_cache_config={"max_tokens": max_tokens}, max_batch_size=64)
    engine = load_engine(args, SoloComm(), is_on_device=True)
    run = DraftedRun(engine, config, **{"max_num_tokens": 64, **knobs})
    run.executor.set_logits_processor("odd", odd)
    answers = run.answer(all_features())
    run.close()
    tokens = {name: (tokens_of(chunks), chunks[-1].finish_reason) for name, chunks in answers.items()}
    return tokens, (run, recording(all_features(), answers))


@pytest.mark.no_cover
@pytest.mark.parametrize("device", ON_DEVICES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_an_engine_whose_steps_stay_on_a_device(drafter: str, device: str, model: Path) -> None:
    """Drafts are computed as chunks are, beside decodes and prompts. The model is in float32, its choices are clear."""
    want, (_, recorded) = run_on_device(model, device, None)
    for schedule in SCHEDULES.values():
        config = ngram_config() if drafter == "ngram" else user_config(guesses(recorded, VOCAB)[drafter])
        got, (run, _) = run_on_device(model, device, config, **schedule)
        assert got == want
        assert any(batch.drafts for batch in run.batches)
        assert any(batch.drafts and len(batch.drafts) < len(batch.generation) for batch in run.batches)
