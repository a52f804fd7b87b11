"""What the model says of every request of an `LLM`: ends of sequence, sampling fields, numbers that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorweave import LLM, SamplingParams
from tensorweave.cluster.errors import LogitsNotFinite
from tests.llmapi.small_llm import CACHE, one
from tests.router.small_tokenizers import byte_level
from tests.workers.tiny_models import make_model

IM_END = 2  # the tokenizer's own end
PROMPT = [9, 8, 7]
FREE = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files name other ends than its tokenizer, and it says how to sample."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", path, vocab_size=len(byte_level().backend), eos_token_id=5)
    byte_level().backend.save_pretrained(path)
    fields = {"eos_token_id": [6], "do_sample": True, "temperature": 1.7, "top_k": 3, "no_repeat_ngram_size": 1}
    (path / "generation_config.json").write_text(json.dumps(fields))
    return path


def ids_of(llm: LLM, **fields: Any) -> list[int]:
    return (
        one(llm.generate(PROMPT, SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **fields})))
        .outputs[0]
        .token_ids
    )


def force(*tokens: int) -> Any:
    """A logits processor that says these tokens, one after another."""

    def process(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        logits[..., tokens[len(token_ids[0]) - len(PROMPT)]] += 1000.0

    return process


def test_ends_of_files_and_tokenizer_are_united_and_end_id_replaces_them(directory: Path) -> None:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as llm:

        def said(*tokens: int, **fields: Any) -> tuple[list[int], str | None, Any]:
            params = SamplingParams(max_tokens=3, logits_processor=force(*tokens, 9, 9, 9), **fields)
            output = one(llm.generate(PROMPT, params)).outputs[0]
            return output.token_ids, output.finish_reason, output.stop_reason

        for end in (5, 6, IM_END):
            assert said(9, end) == ([9, end], "stop", None)
            assert said(9, end, end_id=8) == ([9, end, 9], "length", None)
        assert said(9, 8, end_id=8) == ([9, 8], "stop", None)
    with LLM(directory, skip_tokenizer_init=True, dtype="float32", kv_cache_config=CACHE) as llm:
        assert said(9, IM_END) == ([9, IM_END, 9], "length", None)
        assert said(9, 6) == ([9, 6], "stop", None)


def test_an_llm_samples_as_the_model_says_only_if_told_to(directory: Path) -> None:
    knobs: dict[str, Any] = {"dtype": "float32", "kv_cache_config": CACHE}
    with LLM(directory, **knobs) as plain, LLM(directory, generation_config="auto", **knobs) as told:
        greedy = ids_of(plain)
        assert greedy == ids_of(plain, temperature=0.0)
        assert ids_of(told, seed=1) == ids_of(plain, seed=1, temperature=1.7, top_k=3, no_repeat_ngram_size=1)
        assert ids_of(told, seed=1) != ids_of(told, seed=2)
        assert ids_of(told, temperature=0.0, no_repeat_ngram_size=0) == greedy
        assert ids_of(told, seed=1, top_k=0) == ids_of(plain, seed=1, temperature=1.7, no_repeat_ngram_size=1)
    with pytest.raises(ValueError, match=r"generation_config: Input should be 'auto', 'none' or 'trtllm'"):
        LLM(directory, generation_config="vllm", **knobs)


def test_logits_that_are_not_finite_are_raised_and_the_llm_works_on(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][13] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, kv_cache_config=CACHE) as llm:
        for params in (FREE, SamplingParams(max_tokens=3, repetition_penalty=1.2, logprobs=1, temperature=0.5, seed=1)):
            good, bad = llm.generate_async([4, 7, 3], params), llm.generate_async([4, 13, 3], params)
            with pytest.raises(LogitsNotFinite, match="logits for the next token are not finite"):
                bad.result(timeout=60)
            assert good.result(timeout=60).outputs[0].finish_reason == "length"
