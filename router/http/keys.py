"""API keys: `ApiKeys` admits a request if its `Authorization: Bearer` or its `x-api-key` is one of the service's keys.

A request without a key is answered and its connection closed, so that unauthenticated clients keep no connections open.

Only SHA-256 digests of keys are known (`sha256:` and 64 hex digits). All are compared, in constant time, and nothing
that a client sent is logged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.http import asgi

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})
_NO_KEY: Final = (
    "this server requires an API key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; the request has none that is "
    "valid"
)


class InvalidApiKey(RequestRejected):
    http_status, code = 401, "invalid_api_key"


class KeyRing:
    """The keys that open something. An empty ring opens nothing."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = [bytes.fromhex(digest.removeprefix("sha256:")) for digest in digests]

    def opens(self, scope: Scope) -> bool:
        """Whether the request's `Authorization: Bearer` or `x-api-key` is one of the keys."""
        scheme, _, key = (asgi.header(scope, b"authorization") or b"").partition(b" ")
        is_bearer = self.has(key) and scheme.lower() == b"bearer"
        return self.has(asgi.header(scope, b"x-api-key") or b"") or is_bearer

    def has(self, key: bytes) -> bool:
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


class ApiKeys:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, digests: Iterable[str]) -> None:
        self._app = app
        self._keys = KeyRing(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keys.opens(scope):
            await self._app(scope, receive, send)
        elif _is_open(scope):
            await self._app(scope, receive, _closing(send))
        else:
            await refuse_without_key(scope, send, _NO_KEY, challenge=b"Bearer")


async def refuse_without_key(scope: Scope, send: Send, message: str, challenge: bytes) -> None:
    """Answer 401 and close the connection."""
    error = InvalidApiKey(message)
    headers = [(b"www-authenticate", challenge), asgi.CLOSE]
    await asgi.send_json(send, asgi.error_body(scope, error), status=error.http_status, headers=headers)


def _is_open(scope: Scope) -> bool:
    """OPTIONS only returns a route's methods, and browsers send no key with it."""
    return scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"


def _closing(send: Send) -> Send:
    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), asgi.CLOSE]
        await send(message)

    return send_and_close
