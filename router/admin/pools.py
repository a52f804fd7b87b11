"""Routes of the admin port that change the pools of a running service.

    POST /scale   {"pool": "decode", "replicas": 3}            answered at once
    POST /move    {"source": "prefill", "target": "decode"}    answered once a gang has moved
    POST /update  {"config": {…}}                              answered once the configuration is accepted

An update has the whole configuration with all defaults, as `tensorweave update` sends it (`ServeConfig.to_plain`).
A move may name the gang (`gang_id`) and how long its work may take (`timeout_s`); `/status` shows how far a change is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import orjson
from fastapi import Request, Response
from pydantic import Field
from starlette.routing import Route

from tensorweave.router.admin.json_bodies import JsonBodies
from tensorweave.router.openai.parsing import ParsedRequest, parse_request

_MAX_BODY_BYTES: Final = 1 << 20
_MAX_REPLICAS: Final = 10_000
_MAX_TIMEOUT_S: Final = 3600.0


class PoolControl(Protocol):
    async def scale(self, pool: str, replicas: int) -> None:
        """Raises RequestRejected and NotReady."""

    async def move(self, source: str, target: str, gang_id: str | None, timeout_s: float | None) -> str:
        """The id of the gang that has moved. Raises RequestRejected, NotReady and WorkerLost."""

    async def update(self, plain: Mapping[str, Any]) -> list[str]:
        """The pools whose gangs are replaced. Raises RequestRejected and NotReady."""


class ScaleRequest(ParsedRequest):
    pool: str = Field(min_length=1, max_length=256)
    replicas: int = Field(ge=1, le=_MAX_REPLICAS)


class MoveRequest(ParsedRequest):
    source: str = Field(min_length=1, max_length=256)
    target: str = Field(min_length=1, max_length=256)
    gang_id: str | None = Field(None, max_length=256)
    timeout_s: float | None = Field(None, ge=0, le=_MAX_TIMEOUT_S)


class UpdateRequest(ParsedRequest):
    config: dict[str, Any]


def pool_routes(control: PoolControl) -> list[Route]:
    bodies = JsonBodies(_MAX_BODY_BYTES)

    async def scale(request: Request) -> Response:
        asked = parse_request(ScaleRequest, await bodies.read(request))
        await control.scale(asked.pool, asked.replicas)
        return _json({"pool": asked.pool, "replicas": asked.replicas})

    async def move(request: Request) -> Response:
        asked = parse_request(MoveRequest, await bodies.read(request))
        gang_id = await control.move(asked.source, asked.target, asked.gang_id, asked.timeout_s)
        return _json({"gang_id": gang_id, "source": asked.source, "target": asked.target})

    async def update(request: Request) -> Response:
        asked = parse_request(UpdateRequest, await bodies.read(request))
        return _json({"replaced_pools": await control.update(asked.config)})

    handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {"scale": scale, "move": move, "update": update}
    return [Route(f"/{verb}", handler, methods=["POST"]) for verb, handler in handlers.items()]


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
