"""A service changes while it runs: gangs move between roles by controller and by command, pools grow and shrink, an
update replaces all gangs. Under load, and no request fails. A long run: TENSORWEAVE_TEST_LONG=1."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.e2e.service_process import (
    REPOSITORY,
    ServiceProcess,
    admin_port,
    get_status,
    running_service,
    service_environment,
    wait_until,
    write_config,
    write_model,
)

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif("TENSORWEAVE_TEST_LONG" not in os.environ, reason="a long run: set TENSORWEAVE_TEST_LONG"),
]
WAIT_S = 240.0
ENGINE = {"max_num_tokens": 64, "kv_cache_config": {"max_tokens": 32768}}


class Load:
    """Clients that ask one after another, until told to stop; every answer that is not whole is in `failures`."""

    def __init__(self, port: int, num_clients: int) -> None:
        self.prompt_tokens, self.output_tokens = 1, 1
        self.num_answers = 0
        self.failures: list[str] = []
        self._port = port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a request hangs"

    def _ask(self, client: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            prompt, most = self.prompt_tokens, self.output_tokens
            ids = random.Random(client * 1_000_003 + number).choices(range(3, 200), k=prompt)
            body = {"model": "tiny", "prompt": ids, "max_tokens": most, "temperature": 0, "ignore_eos": True}
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=WAIT_S)
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                if response.status != 200 or json.loads(text)["usage"]["completion_tokens"] != most:
                    self.failures.append(f"{response.status}: {text[:300]!r}")
                self.num_answers += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            finally:
                connection.close()


@contextmanager
def loaded(port: int, num_clients: int) -> Iterator[Load]:
    load = Load(port, num_clients)
    try:
        yield load
    finally:
        load.close()


def status_of(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", admin_port(port), timeout=60)
    try:
        connection.request("GET", "/status")
        status: dict[str, Any] = json.loads(connection.getresponse().read())
        return status
    finally:
        connection.close()


def pools_of(port: int) -> dict[str, dict[str, Any]]:
    return {pool["name"]: pool for pool in status_of(port)["pools"]}


def ready_ids(port: int, name: str) -> set[str]:
    return {gang["gang_id"] for gang in pools_of(port)[name]["gangs"] if gang["state"] == "ready"}


def pids_of(port: int) -> set[int]:
    return {rank["pid"] for pool in pools_of(port).values() for gang in pool["gangs"] for rank in gang["ranks"]}


def command(port: int, *arguments: str) -> str:
    url = f"http://127.0.0.1:{admin_port(port)}"
    done = subprocess.run(
        [sys.executable, "-m", "tensorweave.cli.main", *arguments, "--url", url],
        cwd=REPOSITORY,
        env=service_environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S * 2,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_service(directory: Path, model: Path, **scaling: Any) -> tuple[Path, int]:
    """Two gangs of each role."""
    path, port, _ = write_config(directory, model, request_timeout_s=WAIT_S)
    settings = json.loads(path.read_text())
    settings["engine"] |= ENGINE
    settings["pools"] = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    settings["scaling"] = scaling
    path.write_text(json.dumps(settings))
    return path, port


def say(text: str) -> None:
    print(f"[live] {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def until(holds: Callable[[], bool], what: str, load: Load) -> float:
    seconds = wait_until(holds, WAIT_S, what, every_s=0.5)
    say(f"{what}: after {seconds:.1f} s, {load.num_answers} answers, {len(load.failures)} failed")
    return seconds


def test_the_controller_follows_a_step_in_the_load(tmp_path: Path) -> None:
    """From outputs to prompts and back: times between tokens are decode's load, waiting prompts prefill's."""
    model = write_model(tmp_path / "model")
    scaling = {"moves": True, "interval_s": 1, "window_s": 5, "hold_s": 2, "pause_s": 5, "slack": 0.9}
    config, port = write_service(tmp_path, model, target_itl_s=0.001, target_waiting=1.0, target_ttft_s=20, **scaling)
    with running_service(config):
        before = pids_of(port)
        with loaded(port, 16) as load:
            load.prompt_tokens, load.output_tokens = 4, 300
            until(lambda: len(ready_ids(port, "decode")) == 3, "outputs: three gangs decode", load)
            load.prompt_tokens, load.output_tokens = 1000, 1
            until(lambda: len(ready_ids(port, "prefill")) == 3, "prompts: three gangs prefill", load)
            for text in (event["text"] for event in status_of(port)["faults"]["events"] if event["kind"] == "moved"):
                say(text)
                assert text.count(" has pressure ") == 2
        assert load.failures == []
        assert pids_of(port) == before, "no gang was started anew"


def test_an_update_under_load_loses_no_request(tmp_path: Path) -> None:
    """Another model of the same tokenizer, then other knobs, then more gangs; at the end answers are the new one's."""
    model = write_model(tmp_path / "model")
    newer = shutil.copytree(model, tmp_path / "newer")
    weights = LlamaForCausalLM.from_pretrained(newer)
    for parameter in weights.parameters():
        parameter.data = parameter.data.flip(0)
    weights.save_pretrained(newer)
    config, port = write_service(tmp_path, model)
    changed = json.loads(config.read_text()) | {"model": str(newer)}
    (tmp_path / "changed.yaml").write_text(json.dumps(changed))
    with running_service(config) as service:
        old, answer = {name: ready_ids(port, name) for name in ("prefill", "decode")}, first_answer(port)
        with loaded(port, 6) as load:
            load.prompt_tokens, load.output_tokens = 300, 60
            until(lambda: load.num_answers > 10, "the load runs", load)
            say(command(port, "move", "prefill", "decode").strip())
            assert len(ready_ids(port, "decode")) == 3
            say(command(port, "move", "decode", "prefill").strip())
            assert {name: ready_ids(port, name) for name in old} == old, "the newest gang is the one that came"
            said = command(port, "update", "--config", str(tmp_path / "changed.yaml"), "--wait", "200")
            assert said.count("done: 2 gangs were replaced") == 2, said
            until(lambda: not any(old[name] & ready_ids(port, name) for name in old), "all gangs are new", load)
            knobs = ["--set", "engine.max_batch_size=16", "--wait", "200"]
            command(port, "update", "--config", str(tmp_path / "changed.yaml"), *knobs)
            until(lambda: load.num_answers > 30, "new knobs", load)
            command(port, "scale", "decode", "3", "--wait", "100")
            command(port, "scale", "decode", "1", "--wait", "100")
            until(lambda: len(ready_ids(port, "decode")) == 1, "scaled", load)
        assert load.failures == []
        assert first_answer(port) != answer
        assert get_status(port, "/ready") == 200
        check_refusal(service, port, changed)


def first_answer(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    body = {"model": "tiny", "prompt": list(range(10, 110)), "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        text: str = json.loads(connection.getresponse().read())["choices"][0]["text"]
        return text
    finally:
        connection.close()


def check_refusal(service: ServiceProcess, port: int, config: dict[str, Any]) -> None:
    """What routers have read once is refused by name, and the service goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", admin_port(port), timeout=60)
    plain = {**config, "served_model_name": "other"}
    connection.request("POST", "/update", json.dumps({"config": plain}), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 400
    assert "served_model_name" in json.loads(response.read())["error"]["message"]
    connection.close()
    assert service.process.poll() is None
