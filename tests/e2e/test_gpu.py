"""The same code on GPUs: SmolLM2's greedy ids in float32 on one, and on two and four through a Ray placement group."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorweave import LLM, KvCacheConfig
from tensorweave.workers.store.model_store import resolve_model
from tests.e2e.bfloat16_logprobs import measure
from tests.e2e.service_process import END_TIMEOUT_S, free_ports, known_pools, running_service, wait_until
from tests.e2e.test_smollm2 import GREEDY, GREEDY_64, IDS, chat_prompts, token_ids

MEAN_ERROR, LARGEST_ERROR = 0.1, 0.8
"""Of log-probabilities in bfloat16, natural logarithms."""
NUM_GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.model]


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct")


def needs(num_gpus: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(num_gpus > NUM_GPUS, reason=f"needs {num_gpus} CUDA GPUs, this machine has {NUM_GPUS}")


WAYS = [(1, "AUTO"), (2, "AUTO"), (4, "AUTO"), (2, "ONESHOT"), (4, "ONESHOT")]


@pytest.mark.parametrize(("size", "strategy"), [pytest.param(*way, marks=needs(way[0])) for way in WAYS])
def test_greedy_ids(model: Path, size: int, strategy: Any) -> None:
    knobs: dict[str, Any] = {"tensor_parallel_size": size, "allreduce_strategy": strategy}
    with LLM(model, dtype="float32", device="cuda", kv_cache_config=KvCacheConfig(max_tokens=65536), **knobs) as llm:
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


@needs(1)
def test_bfloat16_log_probabilities(model: Path) -> None:
    cache = KvCacheConfig(max_tokens=65536)
    with LLM(model, dtype="bfloat16", device="cuda", kv_cache_config=cache) as llm:
        prompts = [llm.tokenizer.encode(prompt, add_special_tokens=False) for prompt in chat_prompts(llm)]
        ours, theirs = measure(llm, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), prompts)
    print(f"ours {ours}, transformers in bfloat16 {theirs}")
    assert ours.mean < MEAN_ERROR
    assert ours.largest < LARGEST_ERROR
    assert ours.mean < 1.5 * theirs.mean


def gauges_of(port: int, role: str) -> tuple[int, dict[str, float]]:
    """The pid of rank 0 of the one gang of this role, and its gauges."""
    [pool] = [pool for pool in known_pools(port) if pool["role"] == role]
    rank = pool["gangs"][0]["ranks"][0]
    return int(rank["pid"]), rank["gauges"]


def num_blocks(port: int) -> float:
    """What the decode gang has fetched, from its last heartbeat."""
    _, gauges = gauges_of(port, "decode")
    return gauges.get("kv_transfer_blocks_total", 0.0)


@needs(2)
@pytest.mark.parametrize("backend", ["DEFAULT", "NCCL", "IPC_DIRECT"])
def test_prefill_on_one_gpu_and_decode_on_another(model: Path, tmp_path: Path, backend: str) -> None:
    """Through Ray and HTTP: the known answers, KV really moved, and a decode gang killed in the middle of an answer."""
    port, proxy_port, admin_port = free_ports(3)
    settings = {
        "model": str(model),
        "served_model_name": "m",
        "engine": {
            "device": "cuda",
            "dtype": "float32",
            "kv_cache_config": {"max_tokens": 65536},
            "cache_transceiver_config": {"backend": backend},
        },
        "pools": {"prefill": {}, "decode": {}},
        "router": {"port": port, "proxy_port": proxy_port, "policy": "round_robin", "min_prefill_tokens": 1},
        "admin": {"port": admin_port},
    }
    config = tmp_path / "service.yaml"
    config.write_text(json.dumps(settings))
    with running_service(config) as service:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        tokenizer = AutoTokenizer.from_pretrained(model)
        for question, ids in zip(GREEDY, IDS, strict=True):
            answer = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64
            )
            assert answer.choices[0].message.content == tokenizer.decode(ids, skip_special_tokens=True)

        def stream(prompt: str) -> Any:
            return client.completions.create(
                model="m",
                prompt=prompt,
                max_tokens=400,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )

        prompt = "Once upon a time there was a small robot. " * 80
        whole = "".join(chunk.choices[0].text for chunk in stream(prompt))
        wait_until(lambda: num_blocks(port) > 20, END_TIMEOUT_S, "heartbeats tell that KV was moved")
        pid, gauges = gauges_of(port, "decode")
        print(backend, [line for line in service.lines if "GB/s" in line or "MB/s" in line])
        print({name: value for name, value in gauges.items() if name.startswith("kv_")})
        pieces = []
        for number, chunk in enumerate(stream(prompt)):
            pieces.append(chunk.choices[0].text)
            if number == 50:
                os.kill(pid, signal.SIGKILL)
        assert "".join(pieces) == whole
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(timeout=END_TIMEOUT_S) == 0
