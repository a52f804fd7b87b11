"""API keys: `ApiKeys` lets a request through if its `Authorization: Bearer` is one of the service's.

Keys are known by their SHA-256 digests alone (`sha256:` and 64 hex digits). All are compared, in constant time, and
nothing of what a client sent is logged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router import asgi

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})


class InvalidApiKey(RequestRejected):
    http_status, code = 401, "invalid_api_key"


class ApiKeys:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, digests: Iterable[str]) -> None:
        self._app = app
        self._digests = [bytes.fromhex(digest.removeprefix("sha256:")) for digest in digests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = InvalidApiKey("this server needs an API key, as 'Authorization: Bearer KEY'; none of its own was given")
        headers = [(b"www-authenticate", b"Bearer")]
        await asgi.send_json(send, asgi.error_body(error), status=error.http_status, headers=headers)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = (asgi.header(scope, b"authorization") or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _is_open(scope: Scope) -> bool:
    """OPTIONS only tells a route's methods; browsers send no key with it."""
    return scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"
