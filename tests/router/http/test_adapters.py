"""Adapters as models: their names in lists, requests and answers, and the admin routes that load and unload them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.errors import ModelNotFound, RequestRejected
from tensorweave.router.admin.access import AdminKeys
from tensorweave.router.admin.adapters import adapter_routes
from tensorweave.router.http.app import build_app
from tests.router.admin.small_admin import SmallAdmin
from tests.router.calls import CHAT, COMPLETIONS, check_error, scripted
from tests.router.fake_fleet import FakeFleet, FakeLink
from tests.router.serving import MODEL, chat, client_of, completion, make_service

SQL = Adapter("sql", b"s" * 16, "/adapters/sql")


def ask(method: str, path: str, link: FakeLink, body: Any = None) -> httpx.Response:
    service = make_service(link)
    assert isinstance(service.fleet, FakeFleet)
    service.fleet.adapters = {"sql": SQL}

    async def call() -> httpx.Response:
        async with client_of(build_app(service)) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(call())


def test_they_are_listed_with_their_parent() -> None:
    cards = ask("GET", "/v1/models", scripted()).json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [(MODEL, None), ("sql", MODEL)]
    assert ask("GET", "/v1/models/sql", scripted()).json()["parent"] == MODEL
    assert "/adapters" not in ask("GET", "/v1/models", scripted()).text, "clients see no paths"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, completion()),
        (CHAT, chat()),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_a_request_names_one_as_its_model(path: str, body: dict[str, Any]) -> None:
    link = scripted()
    answer = ask("POST", path, link, {**body, "model": "sql"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "sql"
    assert link.requests[0].adapter == SQL
    link = scripted()
    assert ask("POST", path, link, {**body, "model": MODEL}).json()["model"] == MODEL
    assert link.requests[0].adapter is None


def test_an_unknown_one_is_an_unknown_model() -> None:
    answer = ask("POST", COMPLETIONS, scripted(), completion(model="sqlx"))
    error = check_error(answer, 404, "model", "model_not_found")
    assert "'sql'" in error["message"]


class Control:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def load(self, name: str, path: str, *, is_new: bool) -> Adapter:
        self.calls.append((name, path, is_new))
        if name == "taken":
            raise RequestRejected("there is an adapter 'taken' already", param="lora_name")
        return Adapter(name, b"d" * 16, path)

    async def unload(self, name: str) -> None:
        self.calls.append((name,))
        if name != "sql":
            raise ModelNotFound(f"there is no adapter {name!r}", param="lora_name")


def admin(verb: str, body: Any, control: Control | None = None, keys: AdminKeys | None = None) -> httpx.Response:
    small = SmallAdmin(keys=keys, routes=adapter_routes(control or Control(), [MODEL]))
    return small.run(lambda client: client.post(f"/v1/{verb}_lora_adapter", json=body))


def test_loading_and_unloading() -> None:
    control = Control()
    loaded = admin("load", {"lora_name": "sql", "lora_path": "/a"}, control)
    assert loaded.json() == {"lora_name": "sql", "lora_path": "/a", "digest": "64" * 16}
    admin("load", {"lora_name": "sql", "lora_path": "/b", "load_inplace": True}, control)
    assert admin("unload", {"lora_name": "sql"}, control).json() == {"lora_name": "sql"}
    assert control.calls == [("sql", "/a", True), ("sql", "/b", False), ("sql",)]


@pytest.mark.parametrize(
    ("verb", "body", "status", "param"),
    [
        ("load", {"lora_name": "sql"}, 400, "lora_path"),
        ("load", {"lora_name": "sql", "lora_path": "a/b"}, 400, "lora_path"),
        ("load", {"lora_name": MODEL, "lora_path": "/a"}, 400, "lora_name"),
        ("load", {"lora_name": "", "lora_path": "/a"}, 400, "lora_name"),
        ("load", {"lora_name": "taken", "lora_path": "/a"}, 400, "lora_name"),
        ("load", {"lora_name": "sql", "lora_path": "/a", "lora_int_id": 1}, 400, "lora_int_id"),
        ("unload", {"lora_name": "other"}, 404, "lora_name"),
        ("unload", {}, 400, "lora_name"),
    ],
)
def test_what_is_refused(verb: str, body: dict[str, Any], status: int, param: str) -> None:
    check_error(admin(verb, body), status, param)


def test_they_need_the_admin_key() -> None:
    keys = AdminKeys(["sha256:" + "0" * 64])
    assert admin("load", {"lora_name": "sql", "lora_path": "/a"}, keys=keys).status_code == 401
