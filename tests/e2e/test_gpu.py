"""The same code on GPUs: SmolLM2's greedy ids in float32 on one, and on two over NCCL through a Ray placement group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorweave import LLM, KvCacheConfig
from tensorweave.workers.model_store import resolve_model
from tests.e2e.test_smollm2 import GREEDY_64, IDS, chat_prompts, token_ids

NUM_GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.model]


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct")


def needs(num_gpus: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(num_gpus > NUM_GPUS, reason=f"needs {num_gpus} CUDA GPUs, this machine has {NUM_GPUS}")


@pytest.mark.parametrize("size", [pytest.param(1, marks=needs(1)), pytest.param(2, marks=needs(2))])
def test_greedy_ids(model: Path, size: int) -> None:
    cache = KvCacheConfig(max_tokens=65536)
    with LLM(model, dtype="float32", tensor_parallel_size=size, device="cuda", kv_cache_config=cache) as llm:
        for chunked in (False, True):
            prompts = [*chat_prompts(llm), *([[5] * 3000] if chunked else [])]
            outputs = llm.generate(prompts, GREEDY_64, use_tqdm=False)
            assert isinstance(outputs, list)
            assert token_ids(outputs[:3]) == IDS
        rows = llm.get_stats()
        assert rows[-1]["gpuMemUsage"] > 0


@needs(1)
@pytest.mark.parametrize("size", [pytest.param(1, marks=needs(1)), pytest.param(2, marks=needs(2))])
def test_bfloat16_answers(model: Path, size: int) -> None:
    with LLM(model, dtype="bfloat16", tensor_parallel_size=size, device="cuda") as llm:
        outputs = llm.generate(chat_prompts(llm), GREEDY_64, use_tqdm=False)
        assert isinstance(outputs, list)
        assert "Paris" in outputs[0].outputs[0].text
