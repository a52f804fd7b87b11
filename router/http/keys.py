"""API keys: `ApiKeys` admits a request if its `Authorization: Bearer` or its `x-api-key` is one of the service's keys.

A request without a key is answered and its connection closed, so that unauthenticated clients keep no connections open.

The request's scope then has the key's name, by which its share of the service is accounted.

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
_NAME_DIGITS: Final = 12
_NO_KEY: Final = (
    "this server requires an API key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; the request has none that is "
    "valid"
)


class InvalidApiKey(RequestRejected):
    http_status, code = 401, "invalid_api_key"


class KeyRing:
    """The keys that open something. An empty ring opens nothing."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = [(bytes.fromhex(digest.removeprefix("sha256:")), key_name(digest)) for digest in digests]

    def opens(self, scope: Scope) -> bool:
        """Whether the request's `Authorization: Bearer` or `x-api-key` is one of the keys."""
        return self.opened_by(scope) is not None

    def opened_by(self, scope: Scope) -> str | None:
        """The name of that key, or None."""
        scheme, _, key = (asgi.header(scope, b"authorization") or b"").partition(b" ")
        bearer = self._find(key)
        return self._find(asgi.header(scope, b"x-api-key") or b"") or (bearer if scheme.lower() == b"bearer" else None)

    def has(self, key: bytes) -> bool:
        return self._find(key) is not None

    def _find(self, key: bytes) -> str | None:
        given = hashlib.sha256(key.strip()).digest()
        matches = [name for digest, name in self._digests if hmac.compare_digest(given, digest)]
        return matches[0] if matches else None


def key_name(digest: str) -> str:
    """The name of a key in metrics and logs: the beginning of its digest."""
    return digest.removeprefix("sha256:")[:_NAME_DIGITS]


class ApiKeys:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, digests: Iterable[str]) -> None:
        self._app = app
        self._keys = KeyRing(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = self._keys.opened_by(scope) if scope["type"] == "http" else None
        if name is not None:
            await self._app(asgi.with_api_key(scope, name), receive, send)
        elif scope["type"] != "http":
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
