"""`ChatRelay`: the page's chat, sent on to the service's own endpoint and streamed back as it comes."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Final

import httpx
from fastapi import Request, Response
from starlette.responses import StreamingResponse

from tensorweave.cluster.errors import NotReady
from tensorweave.router.http import asgi
from tensorweave.router.http.body_memory import BodyMemory

_MAX_BODY_BYTES: Final = 1 << 20
_MAX_HELD_BYTES: Final = 8 << 20
_BODY_TIMEOUT_S: Final = 10.0
_TIMEOUT: Final = httpx.Timeout(600.0, connect=5.0)


class ChatRelay:
    """`key`: an API key of the endpoint, where it asks for one."""

    def __init__(
        self,
        endpoint: str,
        key: str | None,
        transport: httpx.AsyncBaseTransport | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._url = f"{endpoint.rstrip('/')}/v1/chat/completions"
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._client = httpx.AsyncClient(
            timeout=_TIMEOUT, headers=headers, transport=transport, trust_env=False, verify=verify
        )
        self._memory = BodyMemory(_MAX_HELD_BYTES)

    async def answer(self, request: Request) -> Response:
        with self._memory.share() as share:
            body = await asgi.read_json_body(
                request.scope, request.receive, share, max_bytes=_MAX_BODY_BYTES, timeout_s=_BODY_TIMEOUT_S
            )
        outgoing = self._client.build_request("POST", self._url, content=body)
        try:
            incoming = await self._client.send(outgoing, stream=True)
        except httpx.HTTPError as error:
            raise NotReady(f"the endpoint at {self._url} does not answer: {type(error).__name__}") from error
        return StreamingResponse(
            _chunks(incoming), incoming.status_code, media_type=incoming.headers.get("content-type")
        )

    async def close(self) -> None:
        await self._client.aclose()


async def _chunks(incoming: httpx.Response) -> AsyncIterator[bytes]:
    """A stream that breaks off ends early, without the last event."""
    try:
        with contextlib.suppress(httpx.HTTPError):
            async for chunk in incoming.aiter_raw():
                yield chunk
    finally:
        await incoming.aclose()
