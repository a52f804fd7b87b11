"""`with_middleware` wraps the whole application, error answers included.

Every answer has the header `x-request-id`, a path's trailing slash is ignored, and, if origins are given, scripts of
web pages may call the service from a browser (CORS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tensorweave.router.http import asgi

_METHODS: Final = ("GET", "HEAD", "POST", "OPTIONS")
_EXPOSED_HEADERS: Final = ("x-request-id", "retry-after")


class PlainPaths:
    """ASGI middleware: `/v1/models/` is `/v1/models`, without a redirect, which some clients do not follow for a
    POST."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


def with_middleware(
    app: ASGIApp, cors_origins: Sequence[str], *, server_echoes_ids: bool, generated_id_prefix: str
) -> ASGIApp:
    """`cors_origins`: "*" alone means any. For the other two see `asgi.RequestIds`."""
    app = PlainPaths(app)
    if cors_origins:
        # Keys are sent in a header that the script sets, never in cookies, so credentials need not be allowed.
        app = CORSMiddleware(
            app,
            allow_origins=cors_origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=_EXPOSED_HEADERS,
        )
    return asgi.RequestIds(app, server_echoes=server_echoes_ids, generated_prefix=generated_id_prefix)
