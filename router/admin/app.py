"""`build_admin_app`: the routes of the admin port, for operators: what clients may not see, and what they may not do.

    GET /                 a page with the live picture; GET /page.js and /page.css belong to it
    GET /status           the picture as JSON
    GET /health           the pools as the supervisor describes them; 503 if the service cannot answer
    GET /metrics          Prometheus: all routers, gangs and pools
    POST /chat            a chat through the service's own endpoint, for the page

Routes that change the service, such as those of `adapters.py`, are given by the deploy room.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorweave.router.admin.access import AdminAccess, AdminKeys
from tensorweave.router.admin.chat import ChatRelay
from tensorweave.router.admin.exposition import render
from tensorweave.router.admin.observer import Observer
from tensorweave.router.admin.picture import make_status
from tensorweave.router.admin.status import Status
from tensorweave.router.http.error_answers import add_error_answers
from tensorweave.router.http.health import HealthReport, judge_health
from tensorweave.router.http.middleware import with_middleware

_PAGE: Final = Path(__file__).parent / "page"
_PAGE_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_SAFE_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True, slots=True)
class AdminService:
    """Everything that the admin app uses.

    Attributes:
        routes: More routes, such as those that change the service; they need a key as all others do.
    """

    model_name: str
    version: str
    keys: AdminKeys
    observer: Observer
    chat: ChatRelay
    heartbeat_limit_s: float
    routes: Sequence[BaseRoute] = ()


def build_admin_app(service: AdminService) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.chat.close()

    app = _AdminApp(service, lifespan)
    for path, (name, media_type) in _PAGE_FILES.items():
        app.add_api_route(path, _page_file(name, media_type), methods=["GET"], include_in_schema=False)
    app.add_api_route("/status", _status(service), methods=["GET"], response_model=Status)
    app.add_api_route("/health", _health(service), methods=["GET"], response_model=None)
    app.add_api_route("/metrics", _metrics(service), methods=["GET"], response_model=None)
    app.add_api_route("/chat", service.chat.answer, methods=["POST"], response_model=None)
    app.router.routes.extend(service.routes)
    app.add_middleware(AdminAccess, keys=service.keys)
    add_error_answers(app)
    return app


class _AdminApp(FastAPI):
    """`build_middleware_stack`: also answers that nothing else has made have the headers."""

    def __init__(self, service: AdminService, lifespan: Callable[[FastAPI], object]) -> None:
        super().__init__(
            title="tensorweave admin",
            version=service.version,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            lifespan=lifespan,  # type: ignore[arg-type]
        )

    def build_middleware_stack(self) -> ASGIApp:
        app = _SafeHeaders(super().build_middleware_stack())
        return with_middleware(app, (), server_echoes_ids=False, generated_id_prefix="")


class _SafeHeaders:
    """ASGI middleware: no browser runs, frames, keeps or guesses at anything that we have not made for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_SAFE_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


Handler = Callable[[], Awaitable[Response]]


def _page_file(name: str, media_type: str) -> Handler:
    content = (_PAGE / name).read_bytes()

    async def page_file() -> Response:
        return Response(content, media_type=media_type)

    return page_file


def _status(service: AdminService) -> Callable[[], Awaitable[Status]]:
    async def status() -> Status:
        """The live picture: pools, gangs and ranks, queues, KV blocks, rates, latencies, transfers, faults."""
        seen = await service.observer.look()
        return make_status(
            seen,
            model=service.model_name,
            version=service.version,
            heartbeat_limit_s=service.heartbeat_limit_s,
        )

    return status


def _health(service: AdminService) -> Handler:
    async def health() -> Response:
        """The pools as their supervisor describes them; 503 if the service cannot answer requests."""
        seen = await service.observer.look()
        if seen.trouble is not None:
            report = HealthReport(False, seen.trouble, [])
        else:
            report = judge_health(seen.pools, service.heartbeat_limit_s, has_link=seen.has_ready_gang)
        body, status = orjson.dumps(report.body()), 200 if report.is_healthy else 503
        return Response(body, status_code=status, media_type="application/json")

    return health


def _metrics(service: AdminService) -> Handler:
    async def metrics() -> Response:
        """Prometheus metrics of all routers, gangs and pools."""
        return Response(render(await service.observer.look(), service.model_name), media_type=CONTENT_TYPE_LATEST)

    return metrics
