"""A service changes while it runs: gangs move between roles by command and by the controller, an update replaces all
gangs, pools grow and shrink. Under load; no request fails, and every token is that of a plain loop. A long run:
TENSORWEAVE_TEST_LONG=1."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tensorweave.deploy.config import load_config
from tests.e2e.live_load import Answer, Load, PlainModel, loaded
from tests.e2e.service_process import (
    REPOSITORY,
    admin_port,
    get_status,
    running_service,
    service_environment,
    wait_until,
    write_config,
    write_model,
)

pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif("TENSORWEAVE_TEST_LONG" not in os.environ, reason="a long run: set TENSORWEAVE_TEST_LONG"),
]
WAIT_S = 400.0
NUM_CLIENTS = 16
NEVER_S = 1e6
ENGINE = {"max_num_tokens": 64, "kv_cache_config": {"max_tokens": 32768}}
PACE = {"interval_s": 1, "window_s": 5, "hold_s": 2, "shrink_hold_s": 5, "pause_s": 5, "slack": 0.9}


def test_a_service_changes_under_load(tmp_path: Path) -> None:
    """First the load changes from outputs to prompts: times between tokens are decode's load, waiting prompts
    prefill's. Then all else."""
    model = write_model(tmp_path / "model")
    newer = write_newer(model, tmp_path / "newer")
    config, port = write_service(tmp_path, model)
    with running_service(config), loaded(port, NUM_CLIENTS, 4, 300) as load:
        service = LiveService(port, config, load)
        before = service.pids()
        service.until_gangs(prefill=1, decode=3)
        load.prompt_tokens, load.output_tokens = 1000, 1
        service.until_gangs(prefill=3, decode=1)
        service.check_reasons()
        move_by_command(service)
        assert service.pids() == before, "gangs move without a restart"
        began_s, ended_s = update_all(service, newer)
        assert not before & service.pids(), "all gangs are new"
        grow_and_shrink(service)
        check_refusal(service)
        assert get_status(port, "/ready") == 200
    assert load.failures == []
    check_tokens(load.answers, PlainModel(model), PlainModel(newer), began_s, ended_s)


class LiveService:
    """A service, its configuration as it is now, and its clients."""

    def __init__(self, port: int, config: Path, load: Load) -> None:
        self.port = port
        self.load = load
        self.config = json.loads(config.read_text())
        self.path = config.with_name("changed.yaml")

    def status(self) -> dict[str, Any]:
        """Once the supervisor has answered in time, which on a busy machine it may not."""
        seen: list[dict[str, Any]] = []

        def is_known() -> bool:
            seen.append(self._look())
            return bool(seen[-1]["pools"])

        wait_until(is_known, WAIT_S, "the pools are known")
        return seen[-1]

    def _look(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", admin_port(self.port), timeout=60)
        try:
            connection.request("GET", "/status")
            status: dict[str, Any] = json.loads(connection.getresponse().read())
            return status
        finally:
            connection.close()

    def gangs(self) -> dict[str, list[dict[str, Any]]]:
        return {pool["name"]: pool["gangs"] for pool in self.status()["pools"]}

    def ready_ids(self) -> dict[str, set[str]]:
        return {
            name: {gang["gang_id"] for gang in gangs if gang["state"] == "ready"}
            for name, gangs in self.gangs().items()
        }

    def pids(self) -> set[int]:
        return {rank["pid"] for gangs in self.gangs().values() for gang in gangs for rank in gang["ranks"]}

    def until_gangs(self, **sizes: int) -> None:
        self.until(lambda: {name: len(ids) for name, ids in self.ready_ids().items()} == sizes, f"ready gangs: {sizes}")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        seconds = wait_until(holds, WAIT_S, what, every_s=0.5)
        self.say(f"{what}: after {seconds:.1f} s")

    def say(self, text: str) -> None:
        figures = f"{len(self.load.answers)} answers, {len(self.load.failures)} failed"
        print(f"[live] {time.strftime('%H:%M:%S')} {figures}: {text.strip()}", file=sys.stderr, flush=True)

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tensorweave.cli.main", *arguments, "--url", self.url],
            cwd=REPOSITORY,
            env=service_environment(),
            capture_output=True,
            text=True,
            timeout=3 * WAIT_S,
        )
        assert done.returncode == 0, f"{done.stderr}\n{json.dumps(self.status()['pools'], indent=1)}"
        self.say(done.stdout)
        return done.stdout

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{admin_port(self.port)}"

    def update(self, **tables: Any) -> str:
        self.config |= tables
        self.path.write_text(json.dumps(self.config))
        return self.command("update", "--config", str(self.path), "--wait", str(2 * WAIT_S))

    def check_reasons(self) -> None:
        """Each move is explained by the pressure on both pools."""
        events = self.status()["faults"]["events"]
        texts = dict.fromkeys(event["text"] for event in events if event["kind"] == "moved")  # both pools have it
        assert len(texts) >= 3
        for text in texts:
            self.say(text)
            assert text.count(" has pressure ") == 2


def write_service(directory: Path, model: Path) -> tuple[Path, int]:
    """Two gangs of each role, which move."""
    path, port, _ = write_config(directory, model, request_timeout_s=WAIT_S)
    settings = json.loads(path.read_text())
    settings["engine"] |= ENGINE
    settings["pools"] = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    targets = {"target_itl_s": 0.001, "target_waiting": 3.0, "target_ttft_s": NEVER_S}
    settings["scaling"] = {"moves": True, **targets, **PACE}
    path.write_text(json.dumps(settings))
    return path, port


def write_newer(model: Path, path: Path) -> Path:
    """Other weights with the same tokenizer."""
    shutil.copytree(model, path)
    weights = LlamaForCausalLM.from_pretrained(path)
    for parameter in weights.parameters():
        parameter.data = parameter.data.flip(0)
    weights.save_pretrained(path)
    return path


def move_by_command(service: LiveService) -> None:
    """The controller leaves it: nothing waits."""
    service.update(scaling={"moves": False, **PACE})
    service.load.prompt_tokens, service.load.output_tokens = 200, 40
    before = service.ready_ids()
    service.command("move", "prefill", "decode")
    service.until_gangs(prefill=2, decode=2)
    service.command("move", "decode", "prefill")
    assert service.ready_ids() == before, "the newest gang is the one that came"


def update_all(service: LiveService, newer: Path) -> tuple[float, float]:
    """Another model and other knobs. Return when it began and ended."""
    service.load.pause_s = 1.0  # so that there is time to start gangs
    began_s = time.monotonic()
    said = service.update(model=str(newer), engine=service.config["engine"] | {"max_batch_size": 16})
    assert "prefill: done: 3 gangs were replaced" in said
    assert "decode: done: 1 gangs were replaced" in said
    return began_s, time.monotonic()


def grow_and_shrink(service: LiveService) -> None:
    """By command and by the time between tokens."""
    service.command("scale", "prefill", "1", "--wait", str(WAIT_S))
    bounds = {"replicas": 1, "min_replicas": 1, "max_replicas": 2}
    service.update(
        pools={"prefill": {"replicas": 1}, "decode": bounds}, scaling={"target_itl_s": 1e-6, "moves": False, **PACE}
    )
    service.until_gangs(prefill=1, decode=2)
    service.update(scaling={"target_itl_s": NEVER_S, "moves": False, **PACE})
    service.until_gangs(prefill=1, decode=1)


def check_refusal(service: LiveService) -> None:
    """What routers have read once is refused by name, and the service goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", admin_port(service.port), timeout=60)
    plain = load_config(service.path).to_plain() | {"served_model_name": "other"}
    connection.request("POST", "/update", json.dumps({"config": plain}), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 400
    assert "served_model_name" in json.loads(response.read())["error"]["message"]
    connection.close()


def check_tokens(answers: list[Answer], old: PlainModel, new: PlainModel, began_s: float, ended_s: float) -> None:
    """Each answer is of one model from its first token to its last."""
    num_old = num_new = 0
    for answer in answers:
        is_old, is_new = old.gives(answer), new.gives(answer)
        assert is_old or is_new, f"wrong tokens after {len(answer.prompt)}: {answer.token_ids}"
        assert is_old or answer.ended_s > began_s, "the new model before the update"
        assert is_new or answer.began_s < ended_s, "the old model after the update"
        num_old, num_new = num_old + is_old, num_new + is_new
    print(f"[live] {num_old} answers of the old model, {num_new} of the new one", file=sys.stderr, flush=True)
    assert num_old
    assert num_new
