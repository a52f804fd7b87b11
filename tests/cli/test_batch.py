"""`batch` against an endpoint that answers as it is told: each line once, whatever happens between."""

from __future__ import annotations

import asyncio
import collections
import errno
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tensorweave.cli import batch_run
from tensorweave.cli.batch_input import ENDPOINTS, BatchRequest, LineIndex, read_lines
from tensorweave.cli.batch_output import ResultFile
from tensorweave.cli.batch_sender import Answer, Sender
from tensorweave.cli.main import main
from tests.http_server import PATIENCE_S, serving

Reply = tuple[int, Any, dict[str, str]]


def answered(body: dict[str, Any], attempt: int) -> Reply | None:
    return 200, {"echo": body["prompt"], "attempt": attempt}, {"x-request-id": f"r-{body['prompt']}"}


class ScriptedService(ThreadingHTTPServer):
    """`reply` gets a request's body and the number of its attempt, from 1; None closes the connection. A text is sent
    as it is, all else as JSON."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[dict[str, Any], int], Reply | None] = answered
        self.attempts: collections.Counter[str] = collections.Counter()
        self.paths: set[str] = set()
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedService

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.attempts[body["prompt"]] += 1
        self.server.paths.add(self.path)
        self.server.keys.add(self.headers["Authorization"])
        reply = self.server.reply(body, self.server.attempts[body["prompt"]])
        if reply is None:
            self.close_connection = True
            return
        status, answer, headers = reply
        payload = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(payload))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with serving(ScriptedService()) as server:
        yield server


def line(name: str, **changes: Any) -> dict[str, Any]:
    request = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": name}}
    return {**request, **changes}


class Batch:
    """A batch's files, and the command over them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"

    def write(self, *lines: dict[str, Any] | str) -> None:
        texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
        self.input.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")

    def run(self, *options: str, url: str | None = None) -> int:
        files = ["--input", str(self.input), "--output", str(self.output)]
        return main(["batch", *files, "--url", url or self.url, *options])

    def answers(self) -> list[dict[str, Any]]:
        return read(self.output)

    def names(self) -> list[str]:
        return sorted(answer["custom_id"] for answer in self.answers())


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(row) for row in text.splitlines()]


@pytest.fixture
def batch(tmp_path: Path, service: ScriptedService) -> Batch:
    return Batch(tmp_path, service.url)


def test_every_line_of_every_endpoint_is_answered(
    batch: Batch, service: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.write(*(line(f"ü{number}", url=url) for number, url in enumerate(ENDPOINTS)), "")
    assert batch.run("--api-key", "secret", url=f"{batch.url}/v1/") == 0
    for answer in batch.answers():
        name = answer["custom_id"]
        body = {"echo": name, "attempt": 1}
        # Headers are Latin-1, which the request id of this service passes through.
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"] == body
        assert answer["response"]["request_id"].startswith("r-")
        assert answer["error"] is None
        assert answer["id"].startswith("batch_req_")
    assert batch.names() == [f"ü{number}" for number in range(4)]
    assert (service.paths, service.keys) == (set(ENDPOINTS), {"Bearer secret"})
    assert batch.errors.read_text() == ""
    shown = capsys.readouterr().err
    assert "4 answered, 0 errors" in shown
    assert "4/4" in shown


def test_lines_that_are_no_requests_are_errors_with_their_numbers(batch: Batch, service: ScriptedService) -> None:
    deep = "[" * 200_000
    bad = ["{", deep, '{"custom_id": NaN}', "[]", line(""), line("a", url="/v1/embeddings"), line("b", method="GET")]
    bad += [line("c", body=[]), line("d", body={"stream": True})]
    batch.write(line("good"), *bad)
    assert batch.run() == 4
    rows = read(batch.errors)
    assert sorted(row["error"]["line"] for row in rows) == list(range(2, 11))
    assert {row["custom_id"] for row in rows} == {None, "a", "b", "c", "d"}
    assert all(row["response"] is None for row in rows)
    messages = {row["error"]["line"]: row["error"]["message"] for row in rows}
    assert "not JSON" in messages[2]
    assert "nested too deeply" in messages[3]
    assert "NaN" in messages[4]
    assert "/v1/messages" in messages[7]
    assert batch.run() == 4  # none is sent or reported again
    assert (batch.names(), len(read(batch.errors)), service.attempts.total()) == (["good"], 9, 1)


def test_two_lines_with_one_custom_id_are_refused_before_anything_is_sent(
    batch: Batch, service: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.write(line("a"), line("b"), "{", line("a"))
    assert batch.run() == 2
    assert "line 4 has the custom_id of line 1, 'a'" in capsys.readouterr().err
    assert not batch.output.exists()
    assert not service.attempts


def test_what_is_temporary_is_tried_again(batch: Batch, service: ScriptedService) -> None:
    troubles: list[Reply | None] = [
        (503, "starting", {}), (429, {}, {"Retry-After": "0"}), (500, {}, {"Retry-After": "tomorrow"}), (408, {}, {}),
        (200, "<html>", {}), None,
    ]  # fmt: skip

    def reply(body: dict[str, Any], attempt: int) -> Reply | None:
        return troubles[int(body["prompt"])] if attempt == 1 else answered(body, attempt)

    service.reply = reply
    batch.write(*(line(str(number)) for number in range(len(troubles))))
    assert batch.run() == 0
    assert batch.names() == [str(number) for number in range(len(troubles))]
    assert {answer["response"]["body"]["attempt"] for answer in batch.answers()} == {2}


def test_what_is_refused_is_an_error_line_with_the_service_s_reason(batch: Batch, service: ScriptedService) -> None:
    reason = {"error": {"message": "no such model"}}
    refusals: dict[str, Reply] = {"a": (404, reason, {}), "b": (413, "too large", {})}
    service.reply = lambda body, attempt: refusals.get(body["prompt"]) or answered(body, attempt)
    batch.write(line("a"), line("b"), line("c"))
    assert batch.run("--errors", str(batch.errors.with_name("e.jsonl"))) == 4
    rows = {row["custom_id"]: row for row in read(batch.errors.with_name("e.jsonl"))}
    assert {name: row["response"]["status_code"] for name, row in rows.items()} == {"a": 404, "b": 413}
    assert (rows["a"]["response"]["body"], rows["b"]["response"]["body"]) == (reason, "too large")
    assert rows["a"]["error"] is None
    assert batch.names() == ["c"]


def test_a_service_that_is_away_for_too_long_leaves_lines_which_the_next_run_answers(
    batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        batch.write(*(line(str(number)) for number in range(9)), "{")
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert batch.run("--retry-for-s", "0.3", "--concurrency", "2", url=away) == 3
    shown = capsys.readouterr().err
    assert "no answer for 0.3 s (--retry-for-s): ConnectError" in shown
    assert "9 left" in shown or "10 left" in shown
    assert batch.run() == 4
    assert batch.names() == [str(number) for number in range(9)]
    assert len(read(batch.errors)) == 1


def test_a_request_that_always_fails_is_left_and_the_others_are_answered(
    batch: Batch, service: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    is_tried_again, all_others_are_sent = threading.Event(), threading.Event()

    def reply(body: dict[str, Any], attempt: int) -> Reply | None:
        if body["prompt"] == "poison":
            if attempt == 2:  # its time runs; others are answered within it
                is_tried_again.set()
                assert all_others_are_sent.wait(PATIENCE_S)
            return 500, {}, {}
        if body["prompt"] == "19":
            all_others_are_sent.set()
        assert is_tried_again.wait(PATIENCE_S)
        return answered(body, attempt)

    service.reply = reply
    batch.write(line("poison"), *(line(str(number)) for number in range(20)))
    assert batch.run("--retry-for-s", "0.3", "--concurrency", "2") == 3
    assert len(batch.answers()) == 20
    assert "20 answered, 0 errors" in (shown := capsys.readouterr().err)
    assert "1 left" in shown
    service.reply = answered
    assert batch.run() == 0
    assert len(batch.answers()) == 21


def test_a_torn_last_line_is_cut_off_and_its_request_is_sent_again(batch: Batch, service: ScriptedService) -> None:
    batch.write(line("a"), line("b"), "{")
    assert batch.run() == 4
    whole = batch.output.read_bytes()
    batch.output.write_bytes(whole[:-20])
    torn = json.loads(whole.splitlines()[-1])["custom_id"]
    batch.errors.write_bytes(b"x" * 200_000)  # longer than what is read at once
    assert batch.run() == 4
    assert batch.names() == ["a", "b"]
    assert service.attempts == {"a": 1, "b": 1} | {torn: 2}
    assert [row["error"]["line"] for row in read(batch.errors)] == [3]


def test_a_file_that_no_batch_has_written_is_left_alone(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    batch.write(line("a"))
    for text in ('{"custom_id": null, "error": null}\n', "a poem\n", "1\n"):
        batch.output.write_text(text)
        assert batch.run() == 2
        assert "out.jsonl: line 1 is not a batch's" in capsys.readouterr().err
        assert batch.output.read_text() == text
    assert batch.run("--errors", str(batch.input)) == 2
    assert "must be three files" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["output", "errors"])
def test_two_runs_do_not_write_one_file(batch: Batch, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch.write(line("a"))
    with ResultFile(getattr(batch, name)):
        assert batch.run() == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert batch.run() == 0


def test_a_wrong_key_ends_the_run_and_makes_no_error_lines(
    batch: Batch, service: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.reply = lambda body, attempt: (401, {}, {})
    batch.write(*(line(str(number)) for number in range(100)))
    assert batch.run("--concurrency", "1") == 2
    assert "HTTP 401: the service asks for another key" in capsys.readouterr().err
    assert (batch.answers(), read(batch.errors), service.attempts.total()) == ([], [], 1)


@pytest.fixture
def is_stopping(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the command says that it has received the first signal."""
    told = threading.Event()
    monkeypatch.setattr(batch_run.tqdm, "write", lambda *args, **options: told.set())
    return told


def test_the_first_signal_lets_running_requests_finish(
    batch: Batch, service: ScriptedService, is_stopping: threading.Event
) -> None:
    def reply(body: dict[str, Any], attempt: int) -> Reply | None:
        if body["prompt"] == "2":
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_stopping.wait(PATIENCE_S)
        return answered(body, attempt)

    service.reply = reply
    batch.write(*(line(str(number)) for number in range(50)))
    assert batch.run("--concurrency", "1") == 3
    assert batch.names() == ["0", "1", "2"]
    service.reply = answered
    assert batch.run() == 0
    assert len(batch.names()) == service.attempts.total() == 50


def test_the_second_signal_cancels_them(batch: Batch, service: ScriptedService, is_stopping: threading.Event) -> None:
    may_answer = threading.Event()

    def reply(body: dict[str, Any], attempt: int) -> Reply | None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert is_stopping.wait(PATIENCE_S)  # two signals at once may be one
        assert may_answer.wait(PATIENCE_S)
        return None

    service.reply = reply
    batch.write(line("a"))
    assert batch.run("--concurrency", "1") == 3
    assert batch.answers() == []
    may_answer.set()


def test_a_full_disk_ends_the_run_and_nothing_follows_half_a_line(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, room = os.write, [2]

    def until_full(descriptor: int, data: Any) -> int:
        if not os.path.samestat(os.fstat(descriptor), os.stat(batch.output)):
            return write(descriptor, data)
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data)[: len(data) if room[0] else 30])

    batch.write(*(line(str(number)) for number in range(20)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", until_full)
        assert batch.run("--concurrency", "3") == 1
    assert "No space left" in capsys.readouterr().err
    assert batch.run() == 0
    assert len(set(batch.names())) == len(batch.names()) == 20


@pytest.mark.parametrize(("status", "others_are_answered"), [(429, True), (429, False), (503, True)])
def test_a_full_queue_is_waited_for_as_long_as_others_are_answered(status: int, others_are_answered: bool) -> None:
    """Each attempt takes 10 s, the fourth one succeeds, and --retry-for-s is 15."""
    waiting, other = (BatchRequest(number, name, "/v1/completions", {}) for number, name in enumerate(("a", "b"), 1))
    now_s, num_attempts = 0.0, 0

    async def reply(request: httpx.Request) -> httpx.Response:
        nonlocal now_s, num_attempts
        if "other" in request.headers:
            return httpx.Response(200, json={})
        now_s, num_attempts = now_s + 10, num_attempts + 1
        if others_are_answered:
            client.headers["other"] = "1"
            assert await sender.send(other) is not None
            del client.headers["other"]
        return httpx.Response(200, json={}) if num_attempts == 4 else httpx.Response(status)

    async def send() -> Answer | None:
        async with client:
            return await sender.send(waiting)

    stopping = asyncio.Event()
    client = httpx.AsyncClient(transport=httpx.MockTransport(reply), base_url="http://service")
    sender = Sender(client, 15.0, stopping, lambda: now_s)
    is_answered = asyncio.run(send()) is not None
    assert is_answered == (status == 429 and others_are_answered)
    assert stopping.is_set() == (not others_are_answered)


def test_an_answer_that_cannot_be_decoded_is_asked_for_again() -> None:
    replies: list[httpx.Response | Exception] = [httpx.Response(200, json={}), httpx.DecodingError("not gzip")]

    def reply(request: httpx.Request) -> httpx.Response:
        if isinstance(answer := replies.pop(), Exception):
            raise answer
        return answer

    async def send() -> Answer | None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(reply), base_url="http://service") as client:
            return await Sender(client, 15.0, asyncio.Event()).send(BatchRequest(1, "a", "/v1/completions", {}))

    assert asyncio.run(send()) is not None
    assert replies == []


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line(name)) + "\n" for name in "abc"))
    with LineIndex() as index:
        index.fill(read_lines(path))
        assert index.mark_done(['"b"', '"b"', '"z"']) == 1
        assert [found.key for found in index.open_lines(read_lines(path))] == ['"a"', '"c"']
        path.write_text(path.read_text() + json.dumps(line("\ud800")))
        with pytest.raises(ValueError, match="line 4 of the input has changed"):
            list(index.open_lines(read_lines(path)))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--url", "127.0.0.1:8000"], "is not of the form"),
        (["--url", "http://127.0.0.1:1", "--set", "a=b"], "leave --url out"),
        (["--url", "http://127.0.0.1:1", "--model", "m"], "a request names its model"),
        (["--set", "router.prot=1"], "prot"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Batch(tmp_path, "")
    batch.write(line("a"))
    assert main(["batch", "--input", str(batch.input), "--output", str(batch.output), *options]) == 2
    assert complaint in capsys.readouterr().err
