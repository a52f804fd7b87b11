"""API keys: `ApiKeys` admits a request if its `Authorization: Bearer` or its `x-api-key` is one of the service's keys.

A request without a key is answered and its connection closed, so that unauthenticated clients keep no connections open.
`may_see_operations` decides whether a request may see hosts, processes and paths.

Only SHA-256 digests of keys are known (`sha256:` and 64 hex digits). All are compared, in constant time, and nothing
that a client sent is logged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.http import asgi

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})
_HAS_KEY: Final = "tensorweave.has_key"
_FORWARDED: Final = (b"forwarded", b"x-forwarded-for", b"x-real-ip")


class InvalidApiKey(RequestRejected):
    http_status, code = 401, "invalid_api_key"


class ApiKeys:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, digests: Iterable[str]) -> None:
        self._app = app
        self._digests = [bytes.fromhex(digest.removeprefix("sha256:")) for digest in digests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_HAS_KEY] = self._has_key(scope)
        if scope[_HAS_KEY]:
            await self._app(scope, receive, send)
        elif _is_open(scope):
            await self._app(scope, receive, _closing(send))
        else:
            error = InvalidApiKey(
                "this server requires an API key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; the request has "
                "none that is valid"
            )
            headers = [(b"www-authenticate", b"Bearer"), asgi.CLOSE]
            await asgi.send_json(send, asgi.error_body(scope, error), status=error.http_status, headers=headers)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = (asgi.header(scope, b"authorization") or b"").partition(b" ")
        is_bearer = self._is_key(key) and scheme.lower() == b"bearer"
        return self._is_key(asgi.header(scope, b"x-api-key") or b"") or is_bearer

    def _is_key(self, key: bytes) -> bool:
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _is_open(scope: Scope) -> bool:
    """OPTIONS only returns a route's methods, and browsers send no key with it."""
    return scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"


def may_see_operations(scope: Scope) -> bool:
    """Whether the request has a key; or, if the service has no keys, whether it is from this host and not forwarded."""
    has_key: bool | None = scope.get(_HAS_KEY)
    return _is_from_here(scope) if has_key is None else has_key


def _is_from_here(scope: Scope) -> bool:
    client, server = scope.get("client"), scope.get("server")
    if client is None or any(asgi.header(scope, name) is not None for name in _FORWARDED):
        return False
    host: str = client[0]
    if server is not None and host == server[0]:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _closing(send: Send) -> Send:
    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), asgi.CLOSE]
        await send(message)

    return send_and_close
