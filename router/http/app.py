"""`build_app`: the HTTP front end as one ASGI application, over a `RouterService`.

It runs under uvicorn and inside Ray Serve. Every path, unknown ones included, answers errors in OpenAI's form (those of
`/v1/messages` in Anthropic's) and with `x-request-id`. Prompt text is never logged.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.routing import Route
from starlette.types import ASGIApp

from tensorweave.cluster.errors import NotReady
from tensorweave.router.bodies.request_body import RequestBody
from tensorweave.router.bodies.tasks import (
    CHAT,
    COMPLETION,
    COUNT_TOKENS,
    DETOKENIZE,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    BodyTask,
)
from tensorweave.router.http import asgi
from tensorweave.router.http.embeddings import EmbeddingsEndpoint
from tensorweave.router.http.endpoint import GenerateEndpoint
from tensorweave.router.http.error_answers import add_error_answers
from tensorweave.router.http.health import check_health
from tensorweave.router.http.keys import ApiKeys
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.router.http.middleware import with_middleware
from tensorweave.router.http.openapi import openapi_document
from tensorweave.router.service import RouterService

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

_GENERATING: Final[Mapping[str, BodyTask[RequestBody]]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    asgi.MESSAGES_PATH: MESSAGES,
    "/v1/responses": RESPONSES,
}
_EMBEDDINGS_PATH: Final = "/v1/embeddings"
_ANSWERING: Final[Mapping[str, BodyTask[bytes]]] = {
    f"{asgi.MESSAGES_PATH}/count_tokens": COUNT_TOKENS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
"""Routes whose answer is computed from the body alone."""


class _App(FastAPI):
    """FastAPI with plain ASGI routes, and an OpenAPI document that describes them.

    `wrap` is applied outside FastAPI's outermost middleware, which answers errors that nothing else has caught.
    """

    def __init__(self, service: RouterService, wrap: Callable[[ASGIApp], ASGIApp]) -> None:
        super().__init__(
            title="tensorweave",
            version=service.version,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            lifespan=_lifespan_of(service),
        )
        self._service = service
        self._wrap = wrap

    def build_middleware_stack(self) -> ASGIApp:
        return self._wrap(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            has_keys = bool(self._service.key_digests)
            names = self._service.names
            self.openapi_schema = openapi_document(self.title, self.version, model_names=names, has_keys=has_keys)
        return self.openapi_schema


def build_app(
    service: RouterService,
    *,
    metrics: RouterMetrics | None = None,
    server_echoes_ids: bool = False,
    generated_id_prefix: str = "",
) -> FastAPI:
    """`server_echoes_ids` and `generated_id_prefix`: see `asgi.RequestIds`."""
    metrics = metrics or RouterMetrics(service.model_name, service.dispatcher)
    service.created_s = service.created_s or int(time.time())
    wrap = functools.partial(
        with_middleware,
        cors_origins=service.cors_origins,
        server_echoes_ids=server_echoes_ids,
        generated_id_prefix=generated_id_prefix,
    )
    app = _App(service, wrap)
    for path, task in _GENERATING.items():
        app.router.routes.append(Route(path, GenerateEndpoint(path, task, service, metrics), methods=["POST"]))
    embeddings = EmbeddingsEndpoint(_EMBEDDINGS_PATH, service, metrics)
    app.router.routes.append(Route(_EMBEDDINGS_PATH, embeddings, methods=["POST"]))
    for path, handler in _handlers(service, metrics).items():
        methods = ["GET", "POST"] if path == "/ping" else ["GET"]
        app.router.routes.append(Route(path, handler, methods=methods))
    for path, answering in _ANSWERING.items():
        app.router.routes.append(Route(path, functools.partial(_answer_body, service, answering), methods=["POST"]))
    if service.key_digests:
        app.add_middleware(ApiKeys, digests=service.key_digests)
    add_error_answers(app)
    return app


def _handlers(service: RouterService, metrics: RouterMetrics) -> dict[str, Handler]:
    """The small GET routes by path."""

    async def models(request: Request) -> Response:
        names = [*service.names, *service.fleet.adapters]
        return _json({"object": "list", "data": [_model_card(service, name) for name in names]})

    async def model(request: Request) -> Response:
        name = request.path_params["model_id"]
        service.adapter(name)
        return _json(_model_card(service, name))

    async def health(request: Request) -> Response:
        report = await check_health(service.fleet, service.limits.heartbeat_limit_s)
        return _json(report.public_body(), status=200 if report.is_healthy else 503)

    async def ready(request: Request) -> Response:
        try:
            await service.fleet.wait_ready(0.0)
        except NotReady:  # its message may name hosts and processes, which are for the admin port
            raise NotReady("the service is not ready") from None
        return _json({"status": "ready"})

    async def load(request: Request) -> Response:
        return _json({"server_load": service.dispatcher.num_running + service.dispatcher.num_waiting})

    async def version(request: Request) -> Response:
        return _json({"version": service.version})

    async def prometheus(request: Request) -> Response:
        return Response(await metrics.render(service.fleet), media_type=CONTENT_TYPE_LATEST)

    return {
        "/v1/models": models,
        "/v1/models/{model_id:path}": model,
        "/health": health,
        "/ping": health,
        "/ready": ready,
        "/load": load,
        "/version": version,
        "/metrics": prometheus,
    }


def _lifespan_of(service: RouterService) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.bodies.warm_up()
        try:
            yield
        finally:
            await service.bodies.close()
            for recorder in service.recorders:
                await asyncio.to_thread(recorder.close)

    return lifespan


async def _answer_body(service: RouterService, task: BodyTask[bytes], request: Request) -> Response:
    limits = service.limits
    with service.body_memory.share() as share:
        body = await asgi.read_json_body(
            request.scope, request.receive, share, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s
        )
        return Response(await service.bodies.run(task, body, await service.served()), media_type="application/json")


def _model_card(service: RouterService, name: str) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "tensorweave",
    }
    if name not in service.names:
        card["parent"] = service.model_name
    info = service.known_info
    return card if info is None else {**card, "max_model_len": info.max_seq_len}


def _json(content: dict[str, Any], *, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")
