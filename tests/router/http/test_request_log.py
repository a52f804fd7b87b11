"""One line per request: what it took and what became of it, and nothing of what was said."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from tensorweave.cluster.log_setup import formatter_of
from tensorweave.router.http.app import build_app
from tensorweave.router.http.request_log import RequestLog
from tests.router.calls import CHAT, COMPLETIONS, scripted
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import MODEL, ONE_ATTEMPT, chat, client_of, completion, make_service

SECRET_PROMPT, SECRET_OUTPUT = "xyzzy-of-the-prompt", "plugh-of-the-output"


def logged(caplog: pytest.LogCaptureFixture, path: str, body: Any, *links: FakeLink, **options: Any) -> dict[str, Any]:
    caplog.set_level(logging.DEBUG)
    service = make_service(*links, **options)
    service.recorders = [RequestLog()]

    async def call() -> None:
        async with client_of(build_app(service)) as client:
            await client.post(path, json=body, headers={"x-request-id": "trace-7"})

    asyncio.run(call())
    [record] = [record for record in caplog.records if record.name == "tensorweave.requests"]
    line = formatter_of("json", "router").format(record)
    for text in (line, caplog.text):
        assert "xyzzy" not in text
        assert "plugh" not in text
    entry: dict[str, Any] = json.loads(line)
    assert (entry["request_id"], entry["path"], entry["level"]) == ("trace-7", path, "INFO")
    assert f"request_id=trace-7 path={path}" in entry["message"]
    return entry


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chat(caplog: pytest.LogCaptureFixture, is_streamed: bool) -> None:
    body = {**chat(SECRET_PROMPT), "stream": is_streamed}
    entry = logged(caplog, CHAT, body, scripted(SECRET_OUTPUT, num_cached=3))
    assert (entry["status"], entry["error"], entry["model"], entry["finish"]) == (200, None, MODEL, "stop")
    assert (entry["stream"], entry["sequences"], entry["attempts"], entry["gangs"]) == (is_streamed, 1, 1, "gang-0")
    assert entry["prompt_tokens"] > 5
    assert entry["cached_tokens"] == 3
    assert entry["output_tokens"] > 5
    assert 0 <= entry["queue_s"] <= entry["ttft_s"] <= entry["duration_s"]


def test_several_sequences(caplog: pytest.LogCaptureFixture) -> None:
    entry = logged(caplog, COMPLETIONS, {**completion(SECRET_PROMPT), "n": 3, "max_tokens": 2}, scripted())
    assert (entry["sequences"], entry["finish"], entry["output_tokens"]) == (3, "length,length,length", 6)


def test_a_request_that_two_gangs_ran(caplog: pytest.LogCaptureFixture) -> None:
    links = [FakeLink(scripted().info, gang_id=name, faults=[Fault("error", 2)]) for name in ("gang-0", "gang-1")]
    entry = logged(caplog, COMPLETIONS, {**completion(SECRET_PROMPT), "max_tokens": 5}, *links)
    assert (entry["status"], entry["attempts"], set(entry["gangs"].split(","))) == (200, 3, {"gang-0", "gang-1"})


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_failure(caplog: pytest.LogCaptureFixture, is_streamed: bool) -> None:
    broken = FakeLink(scripted().info, faults=[Fault("error", 2, closes=True)])
    body = {**completion(SECRET_PROMPT), "max_tokens": 5, "stream": is_streamed}
    entry = logged(caplog, COMPLETIONS, body, broken, limits=ONE_ATTEMPT)
    assert (entry["status"], entry["error"]) == (200 if is_streamed else 503, "worker_lost")


def test_a_body_that_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    entry = logged(caplog, COMPLETIONS, {"model": MODEL, "prompt": SECRET_PROMPT, "best_off": 2}, scripted())
    assert (entry["status"], entry["sequences"], entry["attempts"]) == (400, 0, 0)
    assert entry["error"]


def test_without_the_option_there_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def call() -> None:
        async with client_of(build_app(make_service(scripted()))) as client:
            assert (await client.post(CHAT, json=chat(SECRET_PROMPT))).status_code == 200

    asyncio.run(call())
    assert not [record for record in caplog.records if record.name.startswith("tensorweave")]
