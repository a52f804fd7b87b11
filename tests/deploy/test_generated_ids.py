"""An id that the server generated is not the client's: a request cannot be repeated under it, so no gang is asked for
it. It still names the request in the answer and in logs."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from ray.serve._private import http_util
from starlette.types import ASGIApp

from tensorweave.cluster.ray_internals import mark_generated_ids
from tensorweave.router.http.app import build_app
from tensorweave.router.http.connections import ConnectionLimits, bounded_protocol
from tests.router.calls import CHAT
from tests.router.fake_fleet import FakeLink
from tests.router.serving import PATIENCE_S, chat, client_of, make_service, model_info, running


@pytest.mark.parametrize("server", ["ingress", "plain"])
@pytest.mark.parametrize("name", ["job-7", None])
def test_only_a_clients_own_id_is_looked_for(name: str | None, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_util, "generate_request_id", http_util.generate_request_id)  # what is put there afterwards
    link = FakeLink(model_info())
    app: ASGIApp
    if server == "plain":
        app = build_app(make_service(link))
    else:
        generated = mark_generated_ids()
        app = build_app(make_service(link), server_echoes_ids=True, generated_id_prefix=generated)
        app = http_util.RequestIdMiddleware(app)  # as Serve wraps it

    async def call() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post(CHAT, json=chat(max_tokens=2), headers={"x-request-id": name} if name else {})

    answer = asyncio.run(call())
    assert answer.status_code == 200
    [told] = answer.headers.get_list("x-request-id")
    assert told == name or (name is None and len(told) >= 32)
    [asked] = link.requests
    assert (asked.grace_s > 0) == (name is not None)
    assert asked.request_id.startswith("job-7-") == (name is not None)


@pytest.mark.parametrize("given", ["ü".encode("latin-1"), b"two words", b"", b"x" * 129])
def test_what_is_no_valid_id_is_not_sent_back(given: bytes) -> None:
    app: ASGIApp = build_app(make_service(FakeLink(model_info())), server_echoes_ids=True)
    app = http_util.RequestIdMiddleware(app)  # as Serve wraps it

    async def call() -> httpx.Response:
        http = bounded_protocol(ConnectionLimits(head_timeout_s=PATIENCE_S))
        async with running(app, http) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            return await client.get(f"{url}/version", headers={b"x-request-id": given})

    answer = asyncio.run(call())
    assert answer.status_code == 200
    [told] = answer.headers.get_list("x-request-id")
    assert len(told) >= 32
    assert told != given.decode("latin-1")
