"""The terminal client against an endpoint that answers, refuses and breaks off."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import pytest

from tensorweave.cli.chat import ChatFailed, Conversation
from tensorweave.cli.main import main
from tests.http_server import PATIENCE_S

OPTIONS = {"max_tokens": 16}


def test_one_message_streams_its_answer(endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", endpoint.url, "--message", "Capital?", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    (body,) = endpoint.bodies
    assert body["model"] == "fake-model"
    assert body["stream"] is True
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_a_conversation_keeps_its_messages_but_not_those_of_a_failed_answer(endpoint: Any) -> None:
    with httpx.Client(base_url=endpoint.url, timeout=PATIENCE_S) as client:
        conversation = Conversation(client, "fake-model")
        assert "".join(conversation.ask("one", OPTIONS)) == "The capital of France is Paris."
        endpoint.trouble = "refuse"
        with pytest.raises(ChatFailed):
            list(conversation.ask("two", OPTIONS))
        endpoint.trouble = None
        list(conversation.ask("three", OPTIONS))
        assert [m["content"] for m in endpoint.bodies[-1]["messages"]] == [
            "one",
            "The capital of France is Paris.",
            "three",
        ]
        conversation.reset()
        assert conversation.messages == []


def test_reasoning_is_shown_and_not_sent_back() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"reasoning": "Hm", "reasoning_content": "Hm"}]
    deltas += [{"reasoning": ".", "reasoning_content": "."}, {"content": "Par"}, {"content": "is."}]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = "".join([f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]) + "data: [DONE]\n\n"
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=body))
    with httpx.Client(base_url="http://server", transport=transport) as client:
        conversation = Conversation(client, "m")
        assert "".join(conversation.ask("Capital?", OPTIONS)) == "Hm.\n\nParis."
        assert conversation.messages[-1] == {"role": "assistant", "content": "Paris."}


def test_a_typed_session(endpoint: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nagain\n/exit\n"))
    assert main(["chat", "--url", endpoint.url]) == 0
    assert capsys.readouterr().out.count("is Paris.") == 2
    assert [len(body["messages"]) for body in endpoint.bodies] == [1, 1]


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        ("refuse", "HTTP 429: the queue is full (try again in 3 s)"),
        ("error_event", "the worker was lost"),
        ("cut", "connection"),
        ("gibberish", "does not speak OpenAI's protocol"),
    ],
)
def test_errors_are_reported_in_one_line(
    endpoint: Any, trouble: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.trouble = trouble
    assert main(["chat", "--url", endpoint.url, "--message", "hi"]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


def test_a_key_is_sent_where_one_is_given(endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.api_key = "secret-key-1"
    line = ["chat", "--url", endpoint.url, "--message", "hi"]
    assert main(line) == 1
    assert "HTTP 401: no key" in capsys.readouterr().err
    assert main([*line, "--api-key", "secret-key-1"]) == 0


def test_a_missing_server_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9", "--message", "hi"]) == 1
    assert "cannot reach http://127.0.0.1:9" in capsys.readouterr().err


def test_greeting_asks_and_explains(endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorweave.cli.serve import greet

    greet(endpoint.url, "What is the capital of France?")
    out = capsys.readouterr().out
    assert "The capital of France is Paris.\n" in out
    assert f'base_url="{endpoint.url}/v1"' in out
    assert '{"model": "fake-model"' in out
    assert "--api-key" not in out
    endpoint.trouble = "refuse"
    greet(endpoint.url, "again")
    assert "was not answered: HTTP 429" in capsys.readouterr().err


def test_greeting_has_the_key_of_the_service_and_does_not_show_it(
    endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorweave.cli.serve import greet

    endpoint.api_key = "secret-key-1"
    greet(endpoint.url, "What is the capital of France?")
    assert "was not answered: HTTP 401" in capsys.readouterr().err
    greet(endpoint.url, "What is the capital of France?", "secret-key-1")
    out = capsys.readouterr().out
    assert "The capital of France is Paris.\n" in out
    assert "secret-key-1" not in out
    assert out.count("KEY") == 3
