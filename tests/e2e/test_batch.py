"""`tensorweave batch` over 500 lines while it, a rank and the whole service are killed: each line has one result."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    known_pools,
    running_service,
    service_environment,
    wait_until,
    write_config,
    write_model,
)

pytestmark = pytest.mark.timeout(600)

NUM_LINES = 500
KILLS_AT = (60, 150, 240)
RANK_KILL_AT, SERVICE_KILL_AT = 320, 400
SPARE_LINES = 40
"""Of those that may be answered behind a number that is waited for, so that requests run when it is reached."""
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


class Gate(ThreadingHTTPServer):
    """Between the command and the service on `port`: with `limit` lines in the output no more requests pass, so that
    what is to be killed in the midst of its work is met there, however late. A service that is away, or goes away, is
    so for the command too."""

    daemon_threads = True

    def __init__(self, port: int, output: Path) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.service_port, self.output = port, output
        self.limit = 0
        self._thread = threading.Thread(target=self.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def num_lines(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def __enter__(self) -> Gate:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.limit = NUM_LINES + 1
        self.shutdown()
        self._thread.join(ANSWER_TIMEOUT_S)
        super().__exit__()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The command was killed before its answer came."""


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        while self.server.num_lines() >= self.server.limit:
            time.sleep(0.02)
        service = http.client.HTTPConnection("127.0.0.1", self.server.service_port, timeout=ANSWER_TIMEOUT_S)
        try:
            service.request("POST", self.path, body, {"content-type": "application/json"})
            answer = service.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        finally:
            service.close()
        self.send_response(answer.status)
        for name in ("content-type", "x-request-id", "retry-after"):
            if (value := answer.getheader(name)) is not None:
                self.send_header(name, value)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        return None


class Command:
    """The command over files in one folder, as a process of its own each time."""

    def __init__(self, folder: Path, port: int) -> None:
        self.output, self.errors, self._log = folder / "out.jsonl", folder / "out.errors.jsonl", folder / "log"
        self.gate = Gate(port, self.output)
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests()))
        files = ["--input", str(folder / "in.jsonl"), "--output", str(self.output)]
        command = ["batch", *files, "--url", self.gate.url, "--concurrency", "8"]
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
        """Wait until it has written so many, and still runs: some more may follow, but not the last."""
        self.gate.limit = count + SPARE_LINES
        wait_until(
            lambda: process.poll() is not None or self.gate.num_lines() >= count,
            ANSWER_TIMEOUT_S,
            f"{count} lines are answered",
            every_s=0.01,
        )
        assert process.poll() is None, self.log()

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
    gangs = [gang for pool in known_pools(port) if pool["role"] != "prefill" for gang in pool["gangs"]]
    return next(int(gang["ranks"][0]["pid"]) for gang in gangs if gang["state"] == "ready")


def test_each_line_has_one_result_whatever_is_killed(tmp_path: Path) -> None:
    config, port, _ = write_config(tmp_path, write_model(tmp_path / "model"))
    command = Command(tmp_path, port)
    with command.gate, contextlib.ExitStack() as running:
        with service(config):
            for count in KILLS_AT:
                with command.running() as process:
                    command.wait_lines(process, count)
            process = running.enter_context(command.running())
            command.wait_lines(process, RANK_KILL_AT)
            psutil.Process(a_rank(port)).kill()
            command.wait_lines(process, SERVICE_KILL_AT)
        with service(config):
            command.gate.limit = NUM_LINES
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
