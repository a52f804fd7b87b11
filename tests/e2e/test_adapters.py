"""Adapters of a running service, prefill and decode apart: from the file and loaded later, on every gang that comes,
through the death of each role. Each makes every token its own marker."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedModel

from tests.e2e.service_process import (
    ANSWER_TIMEOUT_S,
    END_TIMEOUT_S,
    ServiceProcess,
    admin_port,
    command_of,
    get_status,
    running_service,
    service_pools,
    wait_for,
    wait_until,
    write_config,
)
from tests.router.small_tokenizers import byte_level
from tests.workers.lora.markers import make_marked_model, write_marker

pytestmark = pytest.mark.timeout(600)

PROMPT = list(range(20, 120))


@dataclass
class Service:
    process: ServiceProcess
    port: int
    model: PreTrainedModel
    path: Path

    def call(self, method: str, path: str, body: Any = None, *, port: int | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=ANSWER_TIMEOUT_S)
        try:
            headers = {"content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def admin(self, verb: str, **fields: Any) -> tuple[int, Any]:
        return self.call("POST", f"/v1/{verb}_lora_adapter", fields, port=admin_port(self.port))

    def tokens(self, model: str, num_tokens: int = 6) -> list[int]:
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        status, answer = self.call("POST", "/v1/completions", body)
        assert status == 200, answer
        assert answer["model"] == model
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    def named(self, name: str) -> list[psutil.Process]:
        return [child for child in self.process.descendants() if command_of(child).startswith(f"ray::{name}")]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("adapters")
    model = make_marked_model(path / "model", vocab_size=len(byte_level().backend), eos_token_id=None)
    byte_level().backend.save_pretrained(path / "model")
    write_marker(model, path / "red", 70)
    config, port, _ = write_config(path, path / "model")
    settings = json.loads(config.read_text())
    settings["engine"]["enable_lora"] = True
    settings |= {"pools": {"prefill": {}, "decode": {}}, "adapters": {"red": str(path / "red")}}
    config.write_text(json.dumps(settings))
    with running_service(config) as process:
        yield Service(process, port, model, path)


def test_adapters_are_models(service: Service) -> None:
    status, models = service.call("GET", "/v1/models")
    assert status == 200
    assert [(card["id"], card.get("parent")) for card in models["data"]] == [("tiny", None), ("red", "tiny")]
    base = service.tokens("tiny")
    assert service.tokens("red") == [70] * 6 != base
    status, answer = service.call("POST", "/v1/completions", {"model": "blue", "prompt": "a"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_loads_and_unloads_take_effect_with_the_next_request(service: Service) -> None:
    blue = service.path / "blue"
    for turn, marker in enumerate((80, 90, 80)):
        write_marker(service.model, blue, marker)
        status, answer = service.admin("load", lora_name="blue", lora_path=str(blue), load_inplace=bool(turn))
        assert status == 200, answer
        assert service.tokens("blue") == [marker] * 6
    status, answer = service.admin("load", lora_name="blue", lora_path=str(blue))
    assert (status, answer["error"]["param"]) == (400, "lora_name")
    status, answer = service.admin("load", lora_name="green", lora_path=str(service.path / "missing"))
    assert status == 400
    assert "no PEFT adapter can be read" in answer["error"]["message"]
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(service.tokens, "blue", 1500)
        wait_until(
            lambda: _num_running(service) > 0 or streaming.done(), END_TIMEOUT_S, "the long answer runs", every_s=0.02
        )
        assert service.admin("unload", lora_name="blue")[0] == 200
        status, answer = service.call("POST", "/v1/completions", {"model": "blue", "prompt": "a"})
        assert status == 404, answer
        assert streaming.result(ANSWER_TIMEOUT_S) == [80] * 1500
    assert service.admin("unload", lora_name="blue")[0] == 404


def _num_running(service: Service) -> float:
    status, load = service.call("GET", "/load")
    return float(load["server_load"]) if status == 200 else 0.0


def test_every_role_may_die(service: Service) -> None:
    write_marker(service.model, service.path / "gold", 100)
    assert service.admin("load", lora_name="gold", lora_path=str(service.path / "gold"))[0] == 200
    base = service.tokens("tiny")
    stop, wrong = threading.Event(), list[Any]()

    def ask_on() -> None:
        while not stop.is_set():
            for name, expected in {"gold": [100] * 40, "red": [70] * 40}.items():
                try:
                    tokens = service.tokens(name, 40)
                except (OSError, http.client.HTTPException, AssertionError):
                    continue  # the router is gone, or a gang is not there yet
                if tokens != expected:
                    wrong.append((name, tokens))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_on)
        try:
            for role in ("prefill", "decode", "supervisor", "router"):
                _kill(service, role)
                for name, expected in {"gold": [100] * 6, "red": [70] * 6, "tiny": base}.items():
                    assert service.tokens(name) == expected, f"{name} after the death of {role}"
        finally:
            stop.set()
        asking.result(ANSWER_TIMEOUT_S)
    assert wrong == []
    status, models = service.call("GET", "/v1/models")
    assert (status, {card["id"] for card in models["data"]}) == (200, {"tiny", "red", "gold"})


def _kill(service: Service, role: str) -> None:
    """With SIGKILL; return once it has been replaced."""
    if role == "supervisor":
        [victim] = service.named("PoolSupervisor")
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: service.named("PoolSupervisor") not in ([], [victim]), END_TIMEOUT_S, "a new supervisor")
        wait_until(lambda: len(service_pools(service.port)) == 2, END_TIMEOUT_S, "it tells of its pools")
    elif role == "router":
        [victim] = service.named("ServeReplica:tensorweave:Router")
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: get_status(service.port, "/ready") == 200, END_TIMEOUT_S, "a new router")
    else:
        before = wait_for(lambda: _pids(service, role), END_TIMEOUT_S, f"a gang of {role} is ready")
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: _pids(service, role) not in ([], before), END_TIMEOUT_S, f"a new gang of {role}")


def _pids(service: Service, role: str) -> list[int]:
    """Of the ranks of ready gangs."""
    gangs = [gang for pool in service_pools(service.port) if pool["role"] == role for gang in pool["gangs"]]
    return [rank["pid"] for gang in gangs if gang["state"] == "ready" for rank in gang["ranks"]]
