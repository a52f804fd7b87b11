"""`make serve`'s own files with the real model, over HTTP: the official client gets the known answers, streamed and
whole, and one that goes away leaves nothing running."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tensorweave.workers.store.model_store import resolve_model
from tests.e2e.service_process import (
    END_TIMEOUT_S,
    REPOSITORY,
    ServiceProcess,
    alive,
    command_of,
    free_ports,
    known_pools,
    running_service,
    wait_until,
)
from tests.e2e.test_smollm2 import GREEDY, IDS

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

NAME = "smollm2-135m-instruct"
MANY_TOKENS = 6000
SEEN_WITHIN_S = 60.0


def messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def check_answers(client: openai.OpenAI, texts: list[str]) -> None:
    for question, ids, text in zip(GREEDY, IDS, texts, strict=True):
        whole = client.chat.completions.create(model=NAME, messages=messages(question), temperature=0, max_tokens=64)
        assert whole.choices[0].message.content == text
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(ids)
        stream = client.chat.completions.create(
            model=NAME,
            messages=messages(question),
            temperature=0,
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(ids)
    completion = client.completions.create(model=NAME, prompt="The sea is", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in completion)


def total(port: int, *names: str) -> float:
    """Of these gauges, over all ranks."""
    ranks = [rank for pool in known_pools(port) for gang in pool["gangs"] for rank in gang["ranks"]]
    return sum(float(rank["gauges"].get(name, 0)) for rank in ranks for name in names)


def num_held(port: int) -> float:
    return total(port, "num_requests_running", "kv_cache_usage_perc")


def check_disconnect(port: int, client: openai.OpenAI) -> None:
    num_before = total(port, "generation_tokens_total")
    stream = client.completions.create(
        model=NAME, prompt="x " * 300, max_tokens=MANY_TOKENS, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_until(lambda: num_held(port) > 0, SEEN_WITHIN_S, "the request is seen running")
    stream.close()
    wait_until(lambda: num_held(port) == 0, SEEN_WITHIN_S, "its blocks are free")
    assert total(port, "generation_tokens_total") - num_before < MANY_TOKENS, "it was not left to run to its end"


AGGREGATED = pytest.param("laptop_aggregated.yaml", marks=pytest.mark.long("takes half a minute"))


@pytest.mark.parametrize("file", ["laptop.yaml", AGGREGATED])
def test_the_real_model_over_http(file: str) -> None:
    model = resolve_model(NAME)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in IDS]
    port, proxy_port, admin_port = free_ports(3)
    config = REPOSITORY / "deploy" / "examples" / file
    ports = (f"router.port={port}", f"router.proxy_port={proxy_port}", f"admin.port={admin_port}")
    with running_service(config, *ports) as service:
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        check_answers(client, texts)
        check_disconnect(port, client)
        assert [listed.id for listed in client.models.list()] == [NAME]
        check_end(service)


@pytest.mark.long("downloads 90 MB")
def test_a_gguf_file_over_http(tmp_path: Path) -> None:
    """The file itself is the model, its blocks of 4 bits are multiplied as they are; answers and usage are those of the
    bfloat16 conversion."""
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.symlink_to((resolve_model("smollm2-gguf") / "model.gguf").resolve())
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(file)))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in IDS]
    port, proxy_port, admin_port = free_ports(3)
    settings = (f"model={file}", f"router.port={port}", f"router.proxy_port={proxy_port}", f"admin.port={admin_port}")
    with running_service(REPOSITORY / "deploy" / "examples" / "laptop_aggregated.yaml", *settings) as service:
        check_answers(openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), texts)
        check_end(service)


def check_end(service: ServiceProcess) -> None:
    family = service.descendants()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=END_TIMEOUT_S) == 0
    wait_until(
        lambda: not any("RankWorker" in command_of(process) for process in alive(family)),
        END_TIMEOUT_S,
        "no rank lives",
    )
