"""ASGI functions of the router: read a body within limits, send answers and errors, detect that the client is gone."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorweave.cluster.errors import RequestRejected, TensorweaveError
from tensorweave.router.anthropic import errors as anthropic_errors
from tensorweave.router.dispatch.fair_queue import NO_KEY
from tensorweave.router.http.body_memory import BodyShare
from tensorweave.router.openai import error_body as openai_errors

Headers = list[tuple[bytes, bytes]]
_JSON: Final = (b"content-type", b"application/json")
_EVENT_STREAM: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MESSAGES_PATH: Final = "/v1/messages"
CLOSE: Final = (b"connection", b"close")
REQUEST_ID_HEADER: Final = b"x-request-id"
_RETRY_AFTER_S: Final = 5.0
_MAX_TRACE_PARENT: Final = 256
_REQUEST_ID_KEY: Final = "tensorweave.request_id"
_CLIENT_ID_KEY: Final = "tensorweave.client_request_id"
_API_KEY_KEY: Final = "tensorweave.api_key_name"
_VALID_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class BodyTooLarge(RequestRejected):
    http_status, code = 413, "body_too_large"


class UnsupportedMediaType(RequestRejected):
    http_status, code = 415, "unsupported_media_type"


class BodyTimeout(RequestRejected):
    http_status, openai_type, code = 408, "timeout_error", "body_timeout"


class ClientGone(Exception):
    """The client has closed the connection."""


class RequestIds:
    """ASGI middleware: every answer has the header `x-request-id`, with the client's own id if it sent one.

    `server_echoes`: the server around the application adds the id that the request came with, so only a replacement
    for an invalid id is added here. `generated_prefix`: start of the ids that this server gives requests without one.
    """

    def __init__(self, app: ASGIApp, *, server_echoes: bool = False, generated_prefix: str = "") -> None:
        self._app = app
        self._server_echoes = server_echoes
        self._generated_prefix = generated_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _given_request_id(scope)
        request_id = (given or secrets.token_hex(16)).encode()
        scope[_REQUEST_ID_KEY] = request_id.decode("ascii")
        scope[_CLIENT_ID_KEY] = (
            None if given and self._generated_prefix and given.startswith(self._generated_prefix) else given
        )
        if self._server_echoes and request_id == header(scope, REQUEST_ID_HEADER):
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id_of(scope: Scope) -> str:
    request_id: str = scope[_REQUEST_ID_KEY]
    return request_id


def client_request_id(scope: Scope) -> str | None:
    """The id that the client gave; None if it gave no valid one."""
    request_id: str | None = scope[_CLIENT_ID_KEY]
    return request_id


def with_api_key(scope: Scope, name: str) -> Scope:
    """The scope of a request that came with the API key of this name."""
    return {**scope, _API_KEY_KEY: name}


def api_key_name(scope: Scope) -> str:
    """The name of the request's API key; `NO_KEY` if the service has no keys."""
    name: str = scope.get(_API_KEY_KEY, NO_KEY)
    return name


def trace_parent(scope: Scope) -> str | None:
    """W3C's `traceparent`: the trace that the client has begun."""
    given = header(scope, b"traceparent")
    return None if given is None else given.decode("latin-1")[:_MAX_TRACE_PARENT]


def is_request_id(value: bytes) -> bool:
    """Whether it is a valid request id."""
    return _VALID_REQUEST_ID.fullmatch(value) is not None


def _given_request_id(scope: Scope) -> str | None:
    given = header(scope, REQUEST_ID_HEADER)
    return given.decode("ascii") if given is not None and is_request_id(given) else None


def header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


async def read_json_body(
    scope: Scope, receive: Receive, share: BodyShare, *, max_bytes: int, timeout_s: float
) -> bytes:
    """Read the body, checking its size as it arrives and counting it in `share`; it must be complete within
    `timeout_s`. Raises BodyTooLarge, BodyTimeout, Overloaded, UnsupportedMediaType or ClientGone."""
    media_type = (header(scope, b"content-type") or b"application/json").split(b";")[0].strip().lower()
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        raise UnsupportedMediaType("the content type must be application/json")
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdigit() and int(announced) > max_bytes:
        raise BodyTooLarge(f"the body has {int(announced)} bytes; the limit is {max_bytes}")
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(receive, share, max_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body was not complete within {timeout_s:g} s") from None


async def _read_body(receive: Receive, share: BodyShare, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        share.take(len(part))
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes, which is the limit")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects, and raise ClientGone instead."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()


def error_body(scope: Scope, error: TensorweaveError) -> bytes:
    """An error in the form of the API that the path belongs to: Anthropic's or OpenAI's."""
    path: str = scope["path"]
    if path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/"):
        return anthropic_errors.error_body(error)
    return openai_errors.error_body(error)


def error_headers(error: TensorweaveError) -> Headers:
    """Retry-After for errors that ask the client to come back later; after a late body the connection is closed."""
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.http_status in (429, 503):
        retry_after_s = _RETRY_AFTER_S
    headers = [] if retry_after_s is None else [(b"retry-after", str(math.ceil(retry_after_s)).encode())]
    return [*headers, CLOSE] if isinstance(error, BodyTimeout) else headers


async def send_json(send: Send, body: bytes, *, status: int = 200, headers: Headers | None = None) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *(headers or ())]})
    await send({"type": "http.response.body", "body": body})


async def send_error(scope: Scope, send: Send, error: TensorweaveError) -> None:
    await send_json(send, error_body(scope, error), status=error.http_status, headers=error_headers(error))


async def start_events(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})


async def send_event(send: Send, events: bytes) -> None:
    await send({"type": "http.response.body", "body": events, "more_body": True})


async def end_events(send: Send, events: bytes) -> None:
    await send({"type": "http.response.body", "body": events, "more_body": False})
