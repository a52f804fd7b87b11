"""`LLM` with other forms of a model: an engine directory, and a model that transformers builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tensorweave import LLM, QuantAlgo, QuantConfig, SamplingParams
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tests.workers.engine_drive import random_prompts
from tests.workers.tiny_models import SHAPE, make_model, their_greedy

PROMPTS = random_prompts(3, 40)
KNOBS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "device": "cpu",
    "num_threads": 1,
    "kv_cache_config": {"max_tokens": 2048},
}
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


def answers_of(path: Path, **knobs: Any) -> list[list[int]]:
    with LLM(model=path, **{**KNOBS, **knobs}) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_an_engine_directory(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    assert answers_of(tmp_path / "engine") == their_greedy(model, PROMPTS, 6)
    with pytest.raises(ValueError, match="was saved for tensor_parallel_size 1, asked for 2"):
        LLM(model=tmp_path / "engine", tensor_parallel_size=2, **KNOBS)
    with pytest.raises(ValueError, match="was saved in float32, asked for bfloat16"):
        LLM(model=tmp_path / "engine", dtype="bfloat16", **KNOBS)


def test_a_quantized_model_is_saved_as_it_is(tmp_path: Path) -> None:
    make_model("llama_8_over_2", tmp_path / "model")
    quantized = {"quant_config": QuantConfig(quant_algo=QuantAlgo.FP8), "dtype": "float32"}
    with LLM(model=tmp_path / "model", **KNOBS, **quantized) as llm:
        expected = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        llm.save(tmp_path / "engine")
    assert answers_of(tmp_path / "engine") == expected
    with LLM(model=tmp_path / "engine", **KNOBS) as llm:
        llm.save(tmp_path / "copy")
    assert answers_of(tmp_path / "copy", **quantized) == expected
    assert answers_of(tmp_path / "model", dtype="float32") != expected


def test_a_model_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architectures"):
        LLM(model=tmp_path, **KNOBS)
    assert answers_of(tmp_path, backend="_autodeploy", dtype="float32") == their_greedy(model, PROMPTS, 6)
    with pytest.raises(ValueError, match="backend 'tensorrt' is not part of tensorweave; use backend='pytorch'"):
        LLM(model=tmp_path, backend="tensorrt", **KNOBS)
