"""Routes of the admin port that load and unload LoRA adapters while the service runs, as vLLM names them.

    POST /v1/load_lora_adapter    {"lora_name": "sql", "lora_path": "/adapters/sql", "load_inplace": false}
    POST /v1/unload_lora_adapter  {"lora_name": "sql"}

They are answered once all gangs and routers have followed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

import orjson
from fastapi import Request, Response
from pydantic import Field
from starlette.routing import Route

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import Adapter
from tensorweave.router.admin.json_bodies import JsonBodies
from tensorweave.router.openai.parsing import ParsedRequest, parse_request

_MAX_BODY_BYTES: Final = 64 << 10


class AdapterControl(Protocol):
    async def load(self, name: str, path: str, *, is_new: bool) -> Adapter:
        """Raises RequestRejected and NotReady."""

    async def unload(self, name: str) -> None:
        """Raises ModelNotFound and NotReady."""


class LoadAdapter(ParsedRequest):
    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadAdapter(ParsedRequest):
    lora_name: str = Field(min_length=1, max_length=256)


def adapter_routes(control: AdapterControl, model_names: Sequence[str]) -> list[Route]:
    bodies = JsonBodies(_MAX_BODY_BYTES)

    async def load(request: Request) -> Response:
        asked = parse_request(LoadAdapter, await bodies.read(request))
        if asked.lora_name in model_names:
            raise RequestRejected(f"{asked.lora_name!r} is the name of the model itself", param="lora_name")
        if not PurePosixPath(asked.lora_path).is_absolute():
            raise RequestRejected("lora_path must be an absolute path, on every rank's host", param="lora_path")
        adapter = await control.load(asked.lora_name, asked.lora_path, is_new=not asked.load_inplace)
        return _json({"lora_name": adapter.name, "lora_path": adapter.path, "digest": adapter.digest.hex()})

    async def unload(request: Request) -> Response:
        asked = parse_request(UnloadAdapter, await bodies.read(request))
        await control.unload(asked.lora_name)
        return _json({"lora_name": asked.lora_name})

    handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {"load": load, "unload": unload}
    return [Route(f"/v1/{verb}_lora_adapter", handler, methods=["POST"]) for verb, handler in handlers.items()]


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
