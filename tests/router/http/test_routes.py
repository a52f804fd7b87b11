"""/tokenize and /detokenize, API keys, and an OpenAPI document that agrees with the answers."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any

import httpx
import pytest

from tensorweave.cluster.errors import NotReady
from tensorweave.router.http.app import build_app
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.requests import CompletionRequest
from tensorweave.router.openai.schemas import (
    DetokenizeAnswer,
    ErrorAnswer,
    Health,
    Load,
    ModelCard,
    ModelList,
    Ready,
    TokenizeAnswer,
    Version,
)
from tests.router.calls import CHAT, COMPLETIONS, TEXT, check_error, get, post, scripted
from tests.router.fake_fleet import FakeFleet
from tests.router.serving import MODEL, chat, client_of, completion, make_service
from tests.router.small_tokenizers import byte_level

KEYS = ("the-first-key", "the-second-key")


# ---- tokens


def test_tokenize_and_back() -> None:
    ids = byte_level().encode(TEXT)
    body = post("/tokenize", {"model": MODEL, "prompt": TEXT}, scripted()).json()
    assert body == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    named = post("/tokenize", {"prompt": "The capital", "return_token_strs": True}, scripted())
    told = TokenizeAnswer.model_validate_json(named.text, strict=True)
    assert told.token_strs == byte_level().backend.convert_ids_to_tokens(told.tokens)
    answer = post("/detokenize", {"tokens": [*ids, 2]}, scripted())
    assert DetokenizeAnswer.model_validate_json(answer.text, strict=True).prompt == TEXT + "<|im_end|>"
    assert post("/detokenize", {"tokens": []}, scripted()).json() == {"prompt": ""}
    assert post("/tokenize", {"prompt": ""}, scripted()).json()["tokens"] == []


def test_a_chat_has_the_tokens_that_the_model_is_given() -> None:
    link = scripted()
    used = post(CHAT, chat("Hi"), link).json()["usage"]["prompt_tokens"]
    messages = chat("Hi")["messages"]
    told = post("/tokenize", {"messages": messages}, scripted()).json()
    assert told["tokens"] == list(link.requests[0].prompt_token_ids)
    assert told["count"] == used
    bare = post("/tokenize", {"messages": messages, "add_generation_prompt": False}, scripted()).json()
    assert bare["count"] < told["count"]


# ---- keys


def call_with_key(
    method: str, path: str, authorization: str | None, body: Any = None, name: str = "authorization"
) -> httpx.Response:
    service = make_service(scripted())
    service.key_digests = [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" for key in KEYS]

    async def call() -> httpx.Response:
        headers = {} if authorization is None else {name: authorization}
        async with client_of(build_app(service)) as client:
            return await client.request(method, path, json=body, headers=headers)

    return asyncio.run(call())


ROUTES = [
    ("POST", "/v1/responses", {"model": MODEL, "input": "Hi"}),
    ("POST", COMPLETIONS, completion()), ("POST", CHAT, chat()), ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [1]}), ("GET", "/v1/models", None), ("GET", f"/v1/models/{MODEL}", None),
    ("GET", "/version", None), ("GET", "/load", None),
    ("GET", "/metrics", None), ("GET", "/openapi.json", None), ("GET", "/nowhere", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_every_route_but_health_needs_a_key(method: str, path: str, body: Any) -> None:
    for key in KEYS:
        assert call_with_key(method, path, f"Bearer {key}", body).status_code == (404 if path == "/nowhere" else 200)
    for wrong in (None, "Bearer", "Bearer the-first-key2", f"Basic {KEYS[0]}", KEYS[0], "Bearer \x7f"):
        answer = call_with_key(method, path, wrong, body)
        check_error(answer, 401, None, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_no_route_is_open_but_health() -> None:
    app = build_app(make_service(scripted()))
    found = {(method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ("GET",)}
    assert len(found) > 20
    is_open = {path for method, path in found if call_with_key(method, path, None).status_code != 401}
    assert is_open == {"/health", "/ready", "/ping"}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/models"])
def test_a_key_may_come_as_anthropics_clients_send_it(path: str) -> None:
    """And on their routes, its absence is answered in their form."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    if path == "/v1/messages":
        body["max_tokens"] = 3
    method = "GET" if path == "/v1/models" else "POST"
    for key in KEYS:
        assert call_with_key(method, path, key, body, "x-api-key").status_code == 200
    for wrong in ("", "x", f"Bearer {KEYS[0]}"):
        answer = call_with_key(method, path, wrong, body, "x-api-key")
        assert answer.status_code == 401
        if method == "POST":
            assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/health", "/health/", "/ready", "/ping"])
def test_health_needs_none(path: str) -> None:
    assert call_with_key("GET", path, None).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("key", [None, KEYS[0]])
def test_a_client_is_told_whether_and_nothing_else(path: str, key: str | None) -> None:
    assert set(call_with_key("GET", path, key and f"Bearer {key}").json()) == {"status"}


def test_a_client_is_not_told_why_it_is_not_ready() -> None:
    service = make_service()
    service.fleet = SecretiveFleet()

    async def ask() -> httpx.Response:
        async with client_of(build_app(service)) as client:
            return await client.get("/ready")

    answer = asyncio.run(ask())
    check_error(answer, 503, None, "not_ready")
    assert SecretiveFleet.WHY not in answer.text


class SecretiveFleet(FakeFleet):
    WHY = "rank 0 (pid 12 on 10.77.0.11) died"

    async def wait_ready(self, timeout_s: float) -> None:
        raise NotReady(self.WHY)


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", CHAT])
def test_who_shows_no_key_keeps_no_connection(path: str) -> None:
    assert call_with_key("GET", path, None).headers["connection"] == "close"
    assert "connection" not in call_with_key("GET", path, f"Bearer {KEYS[0]}").headers


def test_keys_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (KEYS[0], "some-wrong-key"):
        call_with_key("POST", CHAT, f"Bearer {key}", chat())
        assert key not in caplog.text


# ---- the document


def document_of(*keys: str) -> dict[str, Any]:
    service = make_service(scripted())
    service.key_digests = keys
    return dict(build_app(service).openapi())


def test_the_document_has_every_route_and_every_field() -> None:
    document = document_of()
    app = build_app(make_service(scripted()))
    paths = {getattr(route, "path", "").replace(":path}", "}") for route in app.routes}
    assert set(document["paths"]) == paths - {"/openapi.json"}
    schemas = document["components"]["schemas"]
    for model in (CompletionRequest, ChatCompletionRequest):
        told = set(schemas[model.__name__]["properties"])
        assert told == {*model.model_fields, *model.OFF}
        assert schemas[model.__name__]["additionalProperties"] is False
    assert schemas["CompletionRequest"]["properties"]["suffix"]["enum"] == ["", None]


def test_the_document_says_when_a_key_is_needed() -> None:
    assert "security" not in document_of()
    document = document_of("sha256:" + "0" * 64)
    assert document["components"]["securitySchemes"]["ApiKey"] == {"type": "http", "scheme": "bearer"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path in ("/health", "/ready", "/ping")
            assert ("401" in operation["responses"], operation.get("security")) == (
                (False, []) if is_open else (True, None)
            )


def test_what_the_small_routes_answer_is_what_the_document_says() -> None:
    for path, shape in (
        ("/v1/models", ModelList),
        (f"/v1/models/{MODEL}", ModelCard),
        ("/health", Health),
        ("/ping", Health),
        ("/load", Load),
        ("/ready", Ready),
        ("/version", Version),
    ):
        assert shape.model_validate_json(get(path, scripted()).text, strict=True)
    assert Health.model_validate_json(get("/health").text, strict=True).status == "unavailable"
    assert ErrorAnswer.model_validate_json(get("/nowhere").text, strict=True).error.code == "not_found"
