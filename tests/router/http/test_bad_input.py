"""Each kind of bad input: its status, an error object that names the field, and no request at the gangs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.app import build_app
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.calls import CHAT, COMPLETIONS, check_error, get, post, scripted
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import (
    MODEL,
    PATIENCE_S,
    chat,
    client_of,
    completion,
    make_app,
    make_service,
    model_info,
    running,
    until,
)

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
LONG_PROMPT = [5] * 600
TOOL = {"type": "function", "function": {"name": "f"}}
NO_TOOL_ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}
BAD_INPUT: list[tuple[str, Any, int, str | None]] = [
    (CHAT, chat(temperature=-1), 400, "temperature"),
    (CHAT, chat(temperature=2.5), 400, "temperature"),
    (CHAT, chat(temperature="1"), 400, "temperature"),
    (CHAT, chat(top_p=1.1), 400, "top_p"),
    (CHAT, chat(top_p=True), 400, "top_p"),
    (CHAT, chat(min_p=-0.1), 400, "min_p"),
    (CHAT, chat(top_k=-2), 400, "top_k"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(n=129), 400, "n"),
    (CHAT, chat(seed=1.5), 400, "seed"),
    (CHAT, chat(seed=2**70), 400, "seed"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=2**63), 400, "max_tokens"),
    (CHAT, chat(max_completion_tokens=2**70), 400, "max_completion_tokens"),
    (CHAT, chat(min_tokens=9, max_tokens=8), 400, "min_tokens"),
    (CHAT, chat(stop=""), 400, "stop"),
    (CHAT, chat(stop=["a", 1]), 400, "stop"),
    (CHAT, chat(stop=["x"] * 65), 400, "stop"),
    (CHAT, chat(stop_token_ids=[99999]), 400, "stop_token_ids"),
    (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(stream=True, stream_options={"nope": 1}), 400, "stream_options.nope"),
    (CHAT, chat(timeout_s=0), 400, "timeout_s"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
    (CHAT, chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), 400, "tools[0].type"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(response_format={"type": "json"}), 400, "response_format.schema"),
    (CHAT, chat(tool_choice={"type": "function", "function": {"name": "f"}}), 400, "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice=NO_TOOL_ALLOWED), 400, "tool_choice"),
    (CHAT, chat(response_format={"type": "json_schema", "json_schema": {}}), 400, "response_format.json_schema.name"),
    (CHAT, chat(logprobs=5), 400, "logprobs"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=-1), 400, "top_logprobs"),
    (CHAT, chat(prompt_logprobs=21), 400, "prompt_logprobs"),
    (CHAT, chat(prompt_logprobs=1, stream=True), 400, "prompt_logprobs"),
    (CHAT, chat(logit_bias={"x": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"99999": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias.5"),
    (CHAT, chat(logit_bias={"5": "1"}), 400, "logit_bias.5"),
    (CHAT, chat(logit_bias=[5]), 400, "logit_bias"),
    (CHAT, chat(presence_penalty=2.5), 400, "presence_penalty"),
    (CHAT, chat(frequency_penalty=-2.5), 400, "frequency_penalty"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty"),
    (CHAT, chat(no_repeat_ngram_size=-1), 400, "no_repeat_ngram_size"),
    (CHAT, chat(bad_words=[""]), 400, "bad_words[0]"),
    (CHAT, chat(bad_words="x"), 400, "bad_words"),
    (CHAT, chat(top_p_decay=0), 400, "top_p_decay"),
    (CHAT, chat(top_p_min=2), 400, "top_p_min"),
    (CHAT, chat(top_p_reset_ids=99999), 400, "top_p_reset_ids"),
    (CHAT, chat(return_token_ids=1), 400, "return_token_ids"),
    (CHAT, chat(truncate_prompt_tokens=0), 400, "truncate_prompt_tokens"),
    (CHAT, chat(cache_salt=""), 400, "cache_salt"),
    (CHAT, chat(priority=2**40), 400, "priority"),
    (CHAT, chat(prompt_token_ids=[99999]), 400, "prompt_token_ids"),
    (CHAT, chat(stop=5), 400, "stop"),
    (CHAT, chat(stop={"a": "b"}), 400, "stop"),
    (CHAT, chat(stop=[["a"]]), 400, "stop"),
    (CHAT, chat(echo=True), 400, "echo"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities"),
    (CHAT, chat(store="yes"), 400, "store"),
    (CHAT, chat(service_tier=1), 400, "service_tier"),
    (CHAT, chat(verbosity=True), 400, "verbosity"),
    (CHAT, chat(reasoning_effort=3), 400, "reasoning_effort"),
    (CHAT, chat(metadata="a"), 400, "metadata"),
    (CHAT, chat(safety_identifier=5), 400, "safety_identifier"),
    (CHAT, chat(prompt_cache_retention=24), 400, "prompt_cache_retention"),
    (CHAT, chat(prompt_cache_options=[]), 400, "prompt_cache_options"),
    (CHAT, chat(prediction="x"), 400, "prediction"),
    (CHAT, chat(parallel_tool_calls="yes"), 400, "parallel_tool_calls"),
    (COMPLETIONS, completion(store=0), 400, "store"),
    (
        COMPLETIONS,
        completion(disaggregated_params={"request_type": "context_only", "x": 1}),
        400,
        "disaggregated_params.x",
    ),
    (CHAT, chat(chat_template_kwargs={"tokenize": True}), 400, "chat_template_kwargs"),
    (CHAT, chat(max_token=5), 400, "max_token"),
    (CHAT, {"model": MODEL}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "model"),
    (CHAT, {"model": MODEL, "messages": []}, 400, "messages"),
    (CHAT, {"model": MODEL, "messages": "Hi"}, 400, "messages"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"model": MODEL, "messages": [{"role": "alien", "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (
        CHAT,
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content",
    ),
    (
        CHAT,
        {"model": MODEL, "messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        400,
        "messages[0].tool_calls[0].function",
    ),
    (
        CHAT,
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        400,
        "messages",
    ),
    (CHAT, chat("x " * 3000), 400, "messages"),
    (CHAT, chat() | {"model": "other"}, 404, "model"),
    (COMPLETIONS, completion(n=3, best_of=2), 400, "best_of"),
    (COMPLETIONS, completion(best_of=2, stream=True), 400, "best_of"),
    (COMPLETIONS, completion(best_of=0), 400, "best_of"),
    (COMPLETIONS, completion(["a"] * 100, best_of=4), 400, "prompt"),
    (COMPLETIONS, completion(echo=1), 400, "echo"),
    (COMPLETIONS, completion(max_tokens=0), 400, "max_tokens"),
    (COMPLETIONS, completion([5] * 512, echo=True, max_tokens=0), 400, "prompt"),
    (COMPLETIONS, completion([99999], echo=True), 400, "prompt"),
    (COMPLETIONS, completion(suffix="x"), 400, "suffix"),
    (COMPLETIONS, completion(logprobs=21), 400, "logprobs"),
    (COMPLETIONS, completion(logprobs=-1), 400, "logprobs"),
    (COMPLETIONS, completion(logprobs=True), 400, "logprobs"),
    (COMPLETIONS, completion(temperature=-1), 400, "temperature"),
    (COMPLETIONS, completion(top_p=2), 400, "top_p"),
    (COMPLETIONS, completion(n=0), 400, "n"),
    (COMPLETIONS, completion(n=10**9), 400, "n"),
    (COMPLETIONS, completion("x", model="other"), 404, "model"),
    (COMPLETIONS, completion("x", model=5), 400, "model"),
    (TOKENIZE, {}, 400, "prompt"),
    (TOKENIZE, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
    (TOKENIZE, {"prompt": 5}, 400, "prompt"),
    (TOKENIZE, {"messages": []}, 400, "messages"),
    (TOKENIZE, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (TOKENIZE, {"prompt": "a", "model": "other"}, 404, "model"),
    (TOKENIZE, {"prompt": "a", "nope": 1}, 400, "nope"),
    (TOKENIZE, {"prompt": "a", "return_token_strs": "yes"}, 400, "return_token_strs"),
    (TOKENIZE, b"{", 400, None),
    (DETOKENIZE, {}, 400, "tokens"),
    (DETOKENIZE, {"tokens": "a"}, 400, "tokens"),
    (DETOKENIZE, {"tokens": [1.5]}, 400, "tokens[0]"),
    (DETOKENIZE, {"tokens": [-1]}, 400, "tokens"),
    (DETOKENIZE, {"tokens": [99999]}, 400, "tokens"),
    (DETOKENIZE, {"tokens": [1], "model": "other"}, 404, "model"),
    (COMPLETIONS, completion(""), 400, "prompt"),
    (COMPLETIONS, completion([]), 400, "prompt"),
    (COMPLETIONS, completion(["a", 5]), 400, "prompt"),
    (COMPLETIONS, completion([1.5]), 400, "prompt"),
    (COMPLETIONS, completion([True]), 400, "prompt"),
    (COMPLETIONS, completion([99999]), 400, "prompt"),
    (COMPLETIONS, completion([-1]), 400, "prompt"),
    (COMPLETIONS, completion([[]]), 400, "prompt"),
    (COMPLETIONS, completion(LONG_PROMPT), 400, "prompt"),
    (COMPLETIONS, completion(["a"] * 300), 400, "prompt"),
    (COMPLETIONS, completion(None), 400, "prompt"),
    (COMPLETIONS, b"{", 400, None),
    (COMPLETIONS, b"", 400, None),
    (COMPLETIONS, b"[1]", 400, None),
    (COMPLETIONS, b'{"model": "\xff"}', 400, None),
    (COMPLETIONS, b'{"model": "org/tiny", "prompt": "a", "temperature": NaN}', 400, None),
    (COMPLETIONS, b'{"model": "org/tiny", "prompt": "\\ud800"}', 400, None),
    (COMPLETIONS, b"[" * 100_000, 400, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD_INPUT)
def test_bad_input(path: str, body: Any, status: int, param: str | None) -> None:
    link = FakeLink(model_info())
    answer = post(path, body, link, headers={"content-type": "application/json"})
    error = check_error(answer, status, param)
    assert error["type"] == "invalid_request_error"
    assert link.requests == []


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


DEEP = nested(500)
FUNCTION = {"name": "f", "parameters": DEEP}
CALL = {"type": "tool_use", "id": "c", "name": "f", "input": DEEP}
DEEP_BODIES: list[tuple[str, Any]] = [
    (COMPLETIONS, completion(metadata=DEEP)),
    (CHAT, chat(tools=[{"type": "function", "function": FUNCTION}])),
    (CHAT, chat(functions=[FUNCTION])),
    ("/v1/messages", chat(max_tokens=5, tools=[{"name": "f", "input_schema": DEEP}])),
    ("/v1/messages", chat(max_tokens=5, messages=[{"role": "assistant", "content": [CALL]}])),
    ("/v1/messages/count_tokens", chat(tools=[{"name": "f", "input_schema": DEEP}])),
    ("/v1/responses", {"model": MODEL, "input": "Hi", "metadata": DEEP}),
    ("/v1/responses", {"model": MODEL, "input": [{"type": DEEP}]}),
]


@pytest.mark.parametrize(("path", "body"), DEEP_BODIES)
def test_bodies_that_are_nested_deeply(path: str, body: Any) -> None:
    response = post(path, body, scripted())
    assert response.status_code == 400
    assert "levels deep; the limit is 200" in response.json()["error"]["message"]


def test_unknown_field_names_the_nearest() -> None:
    assert "max_tokens" in check_error(post(CHAT, chat(max_token=5), scripted()), 400, "max_token")["message"]


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/nope", "GET", 404, "not_found"),
        ("/v1/models/other", "GET", 404, "model_not_found"),
        (CHAT, "GET", 405, "method_not_allowed"),
        ("/health", "POST", 405, "method_not_allowed"),
        ("/v1/chat/completions/x", "POST", 404, "not_found"),
        ("/v1/models/other/", "GET", 404, "model_not_found"),
        ("/load", "POST", 405, "method_not_allowed"),
        ("/v1/chat/completions", "DELETE", 405, "method_not_allowed"),
        ("/tokenize", "GET", 405, "method_not_allowed"),
        ("/v1/audio/speech", "POST", 404, "not_found"),
        ("/", "OPTIONS", 404, "not_found"),
        ("//", "GET", 404, "not_found"),
    ],
)
def test_wrong_routes(path: str, method: str, status: int, code: str) -> None:
    answer = get(path, scripted(), method=method)
    check_error(answer, status, "model" if code == "model_not_found" else None, code)
    assert ("allow" in answer.headers) == (status == 405)


def test_wrong_content_type() -> None:
    answer = post(CHAT, json.dumps(chat()).encode(), scripted(), headers={"content-type": "text/plain"})
    check_error(answer, 415, None, "unsupported_media_type")


def test_body_limit_by_length_and_while_reading() -> None:
    limits = Limits(max_body_bytes=1000)
    check_error(post(CHAT, chat("x" * 2000), scripted(), limits=limits), 413, None, "body_too_large")
    num_read = 0

    async def endless() -> Any:
        nonlocal num_read
        while True:
            num_read += 1
            yield b"x" * 100

    async def call() -> httpx.Response:
        async with client_of(make_app(scripted(), limits=limits)) as client:
            return await client.post(CHAT, content=endless(), headers={"content-type": "application/json"})

    check_error(asyncio.run(call()), 413, None, "body_too_large")
    assert num_read <= 12


def test_half_a_thousand_requests_at_once_and_a_queue_of_64() -> None:
    """So many are answered as fit, the others are told when to come back, and the service is as before."""

    async def call() -> None:
        link = scripted("ab", step_s=0.02)
        service = make_service(link, limits=Limits(max_inflight=16, max_queued=64))
        async with client_of(build_app(service)) as client:
            answers = await asyncio.gather(*(client.post(CHAT, json=chat()) for _ in range(500)))
            counts = [sum(answer.status_code == status for answer in answers) for status in (200, 429)]
            assert counts == [80, 420]
            for answer in answers:
                if answer.status_code == 429:
                    assert check_error(answer, 429, None, "overloaded")["type"] == "rate_limit_error"
                    assert int(answer.headers["retry-after"]) >= 1
                else:
                    assert answer.json()["choices"][0]["message"]["content"] == "ab"
            assert (service.dispatcher.num_running, service.dispatcher.num_waiting, link.num_inflight) == (0, 0, 0)
            assert (await client.post(CHAT, json=chat())).status_code == 200

    run_stepped(call())


def test_bad_input_harms_no_other_request() -> None:
    """An answer goes on with the same text after every kind of bad input has come in the midst of it."""

    async def call() -> None:
        link = scripted("a b c d e f g" * 3, faults=[Fault("stall", after=5)])
        headers = {"content-type": "application/json"}
        async with client_of(make_app(link)) as client:
            good = asyncio.create_task(client.post(CHAT, json=chat()))
            await until(lambda: link.num_steps == 6)
            for path, body, status, _ in BAD_INPUT:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                assert (await client.post(path, content=content, headers=headers)).status_code == status
            assert link.num_steps == 6
            link.goes_on.set()
            assert (await good).json()["choices"][0]["message"]["content"] == "a b c d e f g" * 3

    asyncio.run(call())


def test_fifty_megabytes_are_refused_unread() -> None:
    """Over a real connection: by the announced length at once, and else as soon as the limit is passed."""

    async def call() -> None:
        async with running(make_app(scripted())) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            lines = [f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 50000000"]
            writer.write("\r\n".join([*lines, "", ""]).encode())
            assert b" 413 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
            writer.close()
            num_sent = 0

            async def chunks() -> Any:
                nonlocal num_sent
                for _ in range(50):
                    num_sent += 1
                    yield b" " * 1_000_000

            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                try:
                    answer = await client.post(
                        url + CHAT, content=chunks(), headers={"content-type": "application/json"}
                    )
                    check_error(answer, 413, None, "body_too_large")
                except (httpx.NetworkError, httpx.RemoteProtocolError):
                    assert num_sent < 50  # the server has hung up on us; its answer is lost with the connection
                assert (await client.post(url + CHAT, json=chat())).status_code == 200

    asyncio.run(call())


def test_a_client_that_leaves_within_its_body_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async def call() -> None:
        link = scripted()
        async with running(make_app(link)) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            for path in (CHAT, TOKENIZE):
                _, writer = await asyncio.open_connection(host, int(port))
                lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 1000"]
                writer.write("\r\n".join([*lines, "", '{"model": ']).encode())
                await writer.drain()
                writer.close()
                await writer.wait_closed()
            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                assert (await client.post(url + CHAT, json=chat())).status_code == 200
        assert len(link.requests) == 1

    asyncio.run(call())
    assert "Traceback" not in caplog.text
