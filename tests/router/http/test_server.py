"""A real uvicorn on loopback: the official client, disconnects, broken connections, and the time that the path adds."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest

from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.app import build_app
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import (
    IM_END,
    MODEL,
    ONE_ATTEMPT,
    PATIENCE_S,
    chat,
    client_of,
    make_app,
    make_service,
    model_info,
    running,
    script_of,
    until,
)
from tests.router.small_tokenizers import byte_level

TEXT = "Paris, 東京, 😀👩‍👩‍👧."


def official(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def test_the_official_client_streams_a_chat() -> None:
    async def call() -> None:
        async with running(make_app(FakeLink(model_info(), script=script_of(TEXT)))) as url, official(url) as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Where?"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == TEXT
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-2].choices[0].finish_reason == "stop"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == len(script_of(TEXT))
            whole = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Where?"}])
            assert whole.choices[0].message.content == TEXT

    asyncio.run(call())


def test_the_official_client_streams_a_completion_and_lists_models() -> None:
    async def call() -> None:
        async with running(make_app(FakeLink(model_info(), script=script_of(TEXT)))) as url, official(url) as client:
            stream = await client.completions.create(model=MODEL, prompt="Where?", max_tokens=100, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
            assert [model.id async for model in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL

    asyncio.run(call())


def test_the_official_client_reads_log_probabilities() -> None:
    async def call() -> None:
        async with running(make_app(FakeLink(model_info(), script=script_of(TEXT)))) as url, official(url) as client:
            completion = await client.completions.create(
                model=MODEL, prompt="Where?", max_tokens=100, logprobs=2, echo=True, logit_bias={"5": -100}
            )
            told = completion.choices[0].logprobs
            assert told is not None
            assert told.token_logprobs is not None
            assert told.tokens is not None
            assert len(told.tokens) == len(told.token_logprobs)
            messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
            fields: dict[str, Any] = {"model": MODEL, "messages": messages, "logprobs": True, "top_logprobs": 3}
            whole = await client.chat.completions.create(**fields, n=2)
            for choice in whole.choices:
                assert choice.logprobs is not None
                assert choice.logprobs.content is not None
                assert [len(token.top_logprobs) for token in choice.logprobs.content] == [3] * len(script_of(TEXT))
            async with client.chat.completions.stream(**fields) as stream:  # adds up what the chunks say
                async for _ in stream:
                    pass
                final = (await stream.get_final_completion()).choices[0]
            assert final.message.content == TEXT
            assert final.logprobs == whole.choices[0].logprobs

    asyncio.run(call())


def test_the_official_client_understands_errors() -> None:
    async def call() -> None:
        link = FakeLink(model_info(), script=script_of("a" * 50), fail_after=3)
        async with running(make_app(link, limits=ONE_ATTEMPT)) as url, official(url) as client:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.completions.create(model=MODEL, prompt="x", suffix="y")
            assert refused.value.param == "suffix"
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")
            stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="lost"):
                _ = [chunk async for chunk in stream]

    asyncio.run(call())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_within_a_step(stream: bool) -> None:
    """The step that it leaves in has no end of its own."""

    async def call() -> None:
        link = FakeLink(model_info(), faults=[Fault("stall", after=3)])
        app = make_app(link)
        async with running(app) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            if stream:
                async with client.stream("POST", f"{url}/v1/chat/completions", json=chat(stream=True)) as answer:
                    await anext(answer.aiter_bytes())
            else:
                await leave_when(lambda: link.num_steps == 4, client.post(f"{url}/v1/chat/completions", json=chat()))
            await asyncio.wait_for(link.has_cancelled.wait(), PATIENCE_S)
            assert link.num_steps <= 4
            assert link.num_inflight == 0
            assert (await client.get(f"{url}/version")).status_code == 200

    asyncio.run(call())


def test_a_client_that_leaves_while_it_waits_frees_its_place_in_line() -> None:
    async def call() -> None:
        link = FakeLink(model_info(), faults=[Fault("stall")])
        service = make_service(link, limits=Limits(max_inflight=1))

        def in_line() -> tuple[int, int, int]:
            return service.dispatcher.num_running, service.dispatcher.num_waiting, link.num_inflight

        async with running(build_app(service)) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            asked = client.post(f"{url}/v1/chat/completions", json=chat(n=3))
            await leave_when(lambda: in_line() == (1, 2, 1), asked)
            await until(lambda: in_line() == (0, 0, 0))
            assert len(link.requests) == 1

    asyncio.run(call())


async def leave_when(is_so: Callable[[], bool], asked: Coroutine[Any, Any, httpx.Response]) -> None:
    """Break the client's connection off."""
    task = asyncio.create_task(asked)
    await until(is_so)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()


def test_the_first_chunk_is_sent_at_once() -> None:
    async def call() -> None:
        link = FakeLink(model_info(), script=script_of("ab"), faults=[Fault("stall", after=1)])
        async with running(make_app(link)) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            async with client.stream("POST", f"{url}/v1/chat/completions", json=chat(stream=True)) as answer:
                lines = answer.aiter_lines()
                while '"content":"a' not in (line := await anext(lines)):
                    assert '"finish_reason":null' in line or not line
                link.goes_on.set()  # the second step ends only now
                rest = [line async for line in lines]
            assert "data: [DONE]" in rest

    asyncio.run(call())


def test_before_dispatch_a_short_chat_takes_about_a_millisecond_at_most() -> None:
    """In-process app call less the same request at the dispatcher: the least of many, which no stall of the machine
    is in. Thrice the promise, for slow ones."""
    body = json.dumps(chat("What is the capital of France?", max_tokens=1, stream=True)).encode()

    async def call() -> tuple[float, float]:
        link = FakeLink(model_info(), script=[5])
        service = make_service(link)
        app = build_app(service)
        over_app, direct = [], []
        for _ in range(100):
            started_s = time.perf_counter()
            await call_app(app, body)
            over_app.append(time.perf_counter() - started_s)
        spec, prompt = link.requests[-1].sampling, link.requests[-1].prompt_token_ids
        for i in range(100):
            started_s = time.perf_counter()
            async for _ in service.dispatcher.generate(GenerateRequest(f"r{i}", prompt, spec)):
                pass
            direct.append(time.perf_counter() - started_s)
        return min(over_app), min(direct)

    over_app_s, direct_s = asyncio.run(call())
    print(f"app {over_app_s * 1e6:.0f} µs, dispatcher {direct_s * 1e6:.0f} µs")
    assert over_app_s - direct_s < 3e-3


async def call_app(app: object, body: bytes) -> list[bytes]:
    """One POST at the ASGI interface, as a server would make it."""
    sent: list[bytes] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"x"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("x", 1),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, object]:
        return messages.pop() if messages else await asyncio.Future()

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])  # type: ignore[arg-type]

    await app(scope, receive, send)  # type: ignore[operator]
    return sent


def test_characters_are_never_split_on_the_wire() -> None:
    ids = [token for token in byte_level().encode(TEXT * 3) if token != IM_END]

    async def call() -> list[str]:
        link = FakeLink(model_info(), script=[*ids, IM_END])
        async with client_of(make_app(link)) as client:
            answer = await client.post("/v1/completions", json={**chat(), "messages": None})
            assert answer.status_code == 400
            body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 400}
            lines = (await client.post("/v1/completions", json=body)).text.split("\n\n")
            return [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]

    pieces = asyncio.run(call())
    assert "".join(pieces) == TEXT * 3
    assert all("\ufffd" not in piece for piece in pieces)
