"""CORS, trailing slashes, HEAD and OPTIONS, and the ids of all answers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.app import build_app
from tensorweave.router.service import RouterService
from tests.router.calls import CHAT, COMPLETIONS, check_error, post, scripted
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import MODEL, PATIENCE_S, chat, client_of, completion, make_service, running, until

PAGE, STRANGER = "https://chat.example.org", "https://elsewhere.example"
KEY = "the-key"


def service_of(
    link: FakeLink, *, origins: Sequence[str] = (PAGE,), has_key: bool = False, **limits: Any
) -> RouterService:
    service = make_service(link, limits=Limits(ready_timeout_s=0.05, **limits))
    service.cors_origins = origins
    service.key_digests = [f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"] if has_key else []
    return service


def call(service: RouterService, method: str, path: str, **kwargs: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client_of(build_app(service)) as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(send())


def preflight(service: RouterService, path: str, origin: str = PAGE, method: str = "POST") -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    return call(service, "OPTIONS", path, headers=headers)


# ---- CORS


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/models/", "/nowhere"])
def test_a_preflight_needs_no_key(path: str, has_key: bool) -> None:
    answer = preflight(service_of(scripted(), has_key=has_key), path)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert {"GET", "POST"} <= set(answer.headers["access-control-allow-methods"].split(", "))
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


def test_a_preflight_of_any_origin_and_of_none() -> None:
    assert preflight(service_of(scripted(), origins="*"), CHAT, STRANGER).headers["access-control-allow-origin"] == "*"
    refused = preflight(service_of(scripted()), CHAT, STRANGER)
    assert refused.status_code == 400
    off = preflight(service_of(scripted(), origins=(), has_key=True), CHAT)
    for answer in (refused, off):
        assert "access-control-allow-origin" not in answer.headers


ANSWERS: list[tuple[str, str, Any, dict[str, str], int]] = [
    ("GET", "/v1/models", None, {"authorization": f"Bearer {KEY}"}, 200),
    ("POST", CHAT, chat(), {"authorization": f"Bearer {KEY}"}, 200),
    ("POST", CHAT, chat(stream=True), {"authorization": f"Bearer {KEY}"}, 200),
    ("POST", CHAT, chat(n=0), {"authorization": f"Bearer {KEY}"}, 400),
    ("POST", CHAT, chat(), {}, 401),
    ("GET", "/nowhere", None, {"authorization": f"Bearer {KEY}"}, 404),
    ("DELETE", CHAT, None, {"authorization": f"Bearer {KEY}"}, 405),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status"), ANSWERS)
def test_every_answer_may_be_read_by_the_page(
    method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    for origin, allowed in ((PAGE, PAGE), (STRANGER, None), (None, None)):
        sent = headers if origin is None else headers | {"origin": origin}
        answer = call(service_of(scripted(), has_key=True), method, path, json=body, headers=sent)
        check_cors(answer, status, allowed)
    answer = call(service_of(scripted(), has_key=True, origins=()), method, path, json=body, headers=headers)
    check_cors(answer, status, None)


def check_cors(answer: httpx.Response, status: int, allowed: str | None) -> None:
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") == allowed
    assert answer.headers["x-request-id"]
    if allowed is not None:
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_full_queue_is_told_to_the_page() -> None:
    async def send() -> httpx.Response:
        link = scripted("ab", faults=[Fault("stall", after=0)])
        service = service_of(link, max_inflight=1, max_queued=0)
        async with client_of(build_app(service)) as client:
            first = asyncio.create_task(client.post(CHAT, json=chat()))
            await until(lambda: service.dispatcher.num_running == 1)
            refused = await client.post(CHAT, json=chat(), headers={"origin": PAGE})
            link.goes_on.set()
            assert (await first).status_code == 200
            return refused

    answer = asyncio.run(send())
    check_cors(answer, 429, PAGE)
    assert "retry-after" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", CHAT, chat()), ("POST", "/tokenize", {"prompt": "a"}), ("GET", "/health", None)],
)
def test_an_internal_error_is_told_to_the_page(method: str, path: str, body: Any) -> None:
    """Whichever layer catches it."""
    service = service_of(scripted())

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("broken")

    service.fleet = Broken()  # type: ignore[assignment]
    answer = call(service, method, path, json=body, headers={"origin": PAGE})
    check_cors(answer, 500, PAGE)
    check_error(answer, 500, None, "internal_error")


# ---- paths and methods


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, chat()), (COMPLETIONS, completion()), ("/tokenize", {"prompt": "a"})]
)
@pytest.mark.parametrize("end", ["/", "//"])
def test_a_slash_at_the_end_of_a_route_is_as_good_as_none(path: str, body: Any, end: str) -> None:
    assert post(path + end, body, scripted()).status_code == 200


def test_models_with_a_slash_are_listed() -> None:
    for path in ("/v1/models/", f"/v1/models/{MODEL}/", "/health/", "/metrics/", "/openapi.json/"):
        plain, slash = (call(service_of(scripted()), "GET", p) for p in (path.rstrip("/"), path))
        assert slash.status_code == plain.status_code == 200
    assert [card["id"] for card in call(service_of(scripted()), "GET", "/v1/models/").json()["data"]] == [MODEL]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (CHAT, {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/v1/models/", {"GET", "HEAD"}),
        ("/ping", {"GET", "HEAD", "POST"}),
    ],
)
def test_options_tells_the_methods_without_a_key(path: str, methods: set[str]) -> None:
    for has_key in (False, True):
        answer = call(service_of(scripted(), origins=(), has_key=has_key), "OPTIONS", path)
        assert (answer.status_code, answer.content) == (204, b"")
        assert set(answer.headers["allow"].split(", ")) == methods
    check_error(call(service_of(scripted(), has_key=True), "OPTIONS", "/nowhere"), 404, None, "not_found")


def test_head_is_get_without_a_body() -> None:
    """Over a real connection, where a body would be taken for the next answer."""

    async def send() -> None:
        async with running(build_app(service_of(scripted()))) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            for path in ("/v1/models", "/health", "/metrics", "/version", "/ping"):
                told = await client.head(url + path)
                assert (told.status_code, told.content) == (200, b"")
                assert int(told.headers["content-length"]) > 0
                assert (await client.get(url + path)).status_code == 200

    asyncio.run(send())


# ---- names, load


def test_every_name_of_the_model_is_as_good_as_another() -> None:
    service = service_of(scripted())
    service.other_names = ["gpt-4o", "tiny/latest"]
    names = [MODEL, "gpt-4o", "tiny/latest"]
    cards = call(service, "GET", "/v1/models").json()["data"]
    assert [card["id"] for card in cards] == names
    for name in names:
        assert call(service, "GET", f"/v1/models/{name}").json()["id"] == name
        for path, body in ((CHAT, chat()), (COMPLETIONS, completion())):
            assert call(service, "POST", path, json=body | {"model": name}).json()["model"] == MODEL
            streamed = call(service, "POST", path, json=body | {"model": name, "stream": True}).text
            assert f'"model":"{MODEL}"' in streamed
            assert "gpt-4o" not in streamed
        assert call(service, "POST", "/tokenize", json={"model": name, "prompt": "a"}).status_code == 200
    error = check_error(call(service, "POST", CHAT, json=chat() | {"model": "gpt-5"}), 404, "model", "model_not_found")
    assert error["message"].endswith("this server has 'org/tiny', 'gpt-4o', 'tiny/latest'")
    assert f'model_name="{MODEL}"' in call(service, "GET", "/metrics").text
    document = build_app(service).openapi()
    assert document["components"]["schemas"]["ChatCompletionRequest"]["properties"]["model"]["enum"] == names


def test_the_load_is_what_runs_and_waits() -> None:
    async def send() -> None:
        link = scripted("ab", faults=[Fault("stall", after=0)] * 3)
        service = service_of(link, max_inflight=2)
        async with client_of(build_app(service)) as client:
            assert (await client.get("/load")).json() == {"server_load": 0}
            answers = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(3)]
            await until(lambda: service.dispatcher.num_running + service.dispatcher.num_waiting == 3)
            assert (await client.get("/load")).json() == {"server_load": 3}
            link.goes_on.set()
            assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200] * 3
            assert (await client.get("/load")).json() == {"server_load": 0}

    asyncio.run(send())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_ping_is_health(method: str) -> None:
    good = call(service_of(scripted()), method, "/ping")
    assert (good.status_code, good.json()["status"]) == (200, "ok")
    bad = call(make_service(), method, "/ping")
    assert (bad.status_code, bad.json()["status"]) == (503, "unavailable")
