"""`tensorweave batch` over 500 lines while it, a rank and the whole service are killed: each line has one result."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.service_process import (
    ANSWER_TIMEOUT_S,
    END_TIMEOUT_S,
    REPOSITORY,
    ServiceProcess,
    alive,
    running_service,
    service_environment,
    service_pools,
    wait_until,
    write_config,
    write_model,
)

pytestmark = pytest.mark.timeout(600)

NUM_LINES = 500
KILLS_AT = (60, 150, 240)
RANK_KILL_AT, SERVICE_KILL_AT = 320, 400
MAX_TOKENS = 6


def requests() -> list[dict[str, Any]]:
    """Lines over all endpoints. A completion repeats its prompt, so an answer under another line's name is noticed."""
    shared = {"model": "tiny", "temperature": 0}
    return [_request(number, shared) for number in range(NUM_LINES)]


def _request(number: int, shared: dict[str, Any]) -> dict[str, Any]:
    question = f"Question {number % 20}"
    messages = {"messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS}
    url, body = [
        ("/v1/completions", {"prompt": f"Line {number}: {question}", "echo": True, "max_tokens": MAX_TOKENS}),
        ("/v1/chat/completions", messages),
        ("/v1/messages", messages),
        ("/v1/responses", {"input": question, "max_output_tokens": 16}),
    ][number % 4]
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": {**shared, **body}}


class Command:
    """The command over files in one folder, as a process of its own each time."""

    def __init__(self, folder: Path, port: int) -> None:
        self.output, self.errors, self._log = folder / "out.jsonl", folder / "out.errors.jsonl", folder / "log"
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests()))
        files = ["--input", str(folder / "in.jsonl"), "--output", str(self.output)]
        command = ["batch", *files, "--url", f"http://127.0.0.1:{port}", "--concurrency", "8"]
        self._command = [sys.executable, "-m", "tensorweave.cli.main", *command]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, cwd=REPOSITORY, env=service_environment(), stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=60)

    def wait_lines(self, process: subprocess.Popen[bytes], count: int) -> None:
        """Wait until it has written so many, and still runs."""
        wait_until(
            lambda: process.poll() is not None or self.num_lines() >= count,
            ANSWER_TIMEOUT_S,
            f"{count} lines are answered",
            every_s=0.01,
        )
        assert process.poll() is None, self.log()

    def num_lines(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def log(self) -> str:
        return self._log.read_text()


@contextmanager
def service(config: Path) -> Iterator[ServiceProcess]:
    """At the end, all its processes are killed at once, as if the host had failed; its ports are free then."""
    with running_service(config) as process:
        try:
            yield process
        finally:
            family = [psutil.Process(process.process.pid), *process.descendants()]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
    wait_until(lambda: not alive(family), END_TIMEOUT_S, "the killed service has ended")


def a_rank(port: int) -> int:
    """The pid of a rank of a ready gang that decodes."""
    gangs = [gang for pool in service_pools(port) if pool["role"] != "prefill" for gang in pool["gangs"]]
    return next(int(gang["ranks"][0]["pid"]) for gang in gangs if gang["state"] == "ready")


def test_each_line_has_one_result_whatever_is_killed(tmp_path: Path) -> None:
    config, port, _ = write_config(tmp_path, write_model(tmp_path / "model"))
    command = Command(tmp_path, port)
    with contextlib.ExitStack() as running:
        with service(config):
            for count in KILLS_AT:
                with command.running() as process:
                    command.wait_lines(process, count)
            process = running.enter_context(command.running())
            command.wait_lines(process, RANK_KILL_AT)
            psutil.Process(a_rank(port)).kill()
            command.wait_lines(process, SERVICE_KILL_AT)
        with service(config):
            assert process.wait(timeout=ANSWER_TIMEOUT_S) == 0, command.log()
    check_results(command)


def check_results(command: Command) -> None:
    lines = [json.loads(line) for line in command.output.read_text().splitlines()]
    assert command.errors.read_text() == ""
    assert sorted(line["custom_id"] for line in lines) == sorted(f"line-{number}" for number in range(NUM_LINES))
    chats: dict[str, set[str]] = {}
    for line in lines:
        number, body = int(line["custom_id"].removeprefix("line-")), line["response"]["body"]
        question = f"Question {number % 20}"
        assert line["response"]["status_code"] == 200
        if number % 4 == 0:
            assert body["choices"][0]["text"].startswith(f"Line {number}: {question}")
        elif number % 4 == 1:
            chats.setdefault(question, set()).add(body["choices"][0]["message"]["content"])
    assert {len(texts) for texts in chats.values()} == {1}
