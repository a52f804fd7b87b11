"""One HTTP call in process, and what every error's answer looks like."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeLink
from tests.router.serving import client_of, make_app, model_info, script_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "Grüße aus 東京 😀!"


def post(
    path: str,
    body: Any,
    *links: FakeLink,
    limits: Limits | None = None,
    tokenizer: Tokenizer | None = None,
    is_stepped: bool = False,
    **kwargs: Any,
) -> httpx.Response:
    """`is_stepped`: deadlines and steps take no time, and come in the order of the clock whatever the machine does."""

    async def call() -> httpx.Response:
        async with client_of(make_app(*links, limits=limits, tokenizer=tokenizer)) as client:
            if isinstance(body, bytes):
                return await client.post(path, content=body, **kwargs)
            return await client.post(path, json=body, **kwargs)

    return run_stepped(call()) if is_stepped else asyncio.run(call())


def get(path: str, *links: FakeLink, method: str = "GET", headers: dict[str, str] | None = None) -> httpx.Response:
    async def call() -> httpx.Response:
        async with client_of(make_app(*links)) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(call())


def scripted(text: str = TEXT, **options: Any) -> FakeLink:
    return FakeLink(model_info(), script=script_of(text), **options)


def check_error(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert code is None or error["code"] == code
    return error
