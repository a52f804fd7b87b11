"""For the HTTP tests: a service over a fake fleet, an in-process client, and a real uvicorn on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from tensorweave.cluster.protocol import ModelInfo, Role
from tensorweave.router.bodies.pool import BodyPool
from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.app import build_app
from tensorweave.router.service import RouterService
from tensorweave.router.text.tokens import Tokenizer
from tests.router.fake_fleet import FakeFleet, FakeLink
from tests.router.small_tokenizers import byte_level

MODEL = "org/tiny"
IM_END = 2
ONE_ATTEMPT = Limits(ready_timeout_s=0.05, max_attempts=1)
PATIENCE_S = 60.0
"""Longest wait for what must come: nothing that is right on a slow machine takes so long."""


def model_info(max_seq_len: int = 512, vocab_size: int | None = None) -> ModelInfo:
    return ModelInfo(
        model=MODEL,
        vocab_size=vocab_size or byte_level().vocab_size,
        max_seq_len=max_seq_len,
        dtype="float32",
        tokens_per_block=32,
        num_blocks=100,
        end_ids=(IM_END,),
        guided_decoding_backend="auto",
    )


def script_of(text: str) -> list[int]:
    return [*byte_level().encode(text), IM_END]


def make_service(
    *links: FakeLink,
    limits: Limits | None = None,
    accepts_phases: bool = True,
    tokenizer: Tokenizer | None = None,
    chat: ChatSettings | None = None,
    roles: frozenset[Role] = frozenset[Role]({"both"}),
) -> RouterService:
    limits = limits or Limits(ready_timeout_s=0.05)
    fleet = FakeFleet(*links)
    service = RouterService(
        model_name=MODEL,
        tokenizer=tokenizer or byte_level(),
        dispatcher=Dispatcher(fleet, limits=limits),
        fleet=fleet,
        version="1.2.3",
        limits=limits,
        accepts_phases=accepts_phases,
        chat=chat or ChatSettings(),
        roles=roles,
    )
    service.bodies = quick_bodies(service)
    return service


def quick_bodies(service: RouterService) -> BodyPool:
    """Without worker processes for bodies that are short, which take two seconds to start."""
    reads_inline = not service.chat.accepts_templates
    return BodyPool(service.tokenizer, reads_inline=reads_inline, looks_long=lambda body: False)


def make_app(*links: FakeLink, limits: Limits | None = None, tokenizer: Tokenizer | None = None) -> FastAPI:
    return build_app(make_service(*links, limits=limits, tokenizer=tokenizer))


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=PATIENCE_S) as client:
        yield client


@asynccontextmanager
async def running(app: ASGIApp, http: Any = "auto") -> AsyncIterator[str]:
    """A real server, with uvicorn's own protocol or another one; yields its base URL."""
    # Kept alive for long: a connection that is given up just as its client writes fails that request.
    config = uvicorn.Config(app, http=http, log_level="warning", lifespan="off", ws="none", timeout_keep_alive=600)
    server = uvicorn.Server(config)
    # By name: asyncio sets TCP_NODELAY only where the protocol is known, and Nagle's delay costs 40 ms an answer.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # who calls before the server runs waits for it
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, PATIENCE_S)
        listener.close()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.005)


def events_of(body: str) -> list[Any]:
    """The data of each server-sent event; '[DONE]' stays a string."""
    blocks = [block for block in body.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def chat(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def completion(prompt: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}
