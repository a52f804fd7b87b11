"""The routes that change pools: what they ask of the service, what they answer, and who may use them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.deploy.api_keys import digest_of
from tensorweave.router.admin.access import AdminKeys
from tensorweave.router.admin.pools import pool_routes
from tests.router.admin.small_admin import SmallAdmin, pool


class _Control:
    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def scale(self, pool: str, replicas: int) -> None:
        if pool != "decode":
            raise RequestRejected(f"there is no pool {pool!r}; there are: decode")
        self.asked.append((pool, replicas))

    async def move(self, source: str, target: str, gang_id: str | None, timeout_s: float | None) -> str:
        if timeout_s == 0:
            raise NotReady("gang g still has requests after 0 s; it stays where it is")
        self.asked.append((source, target, gang_id, timeout_s))
        return gang_id or "g"

    async def update(self, plain: Mapping[str, Any]) -> list[str]:
        self.asked.append((plain,))
        return ["main"]


@pytest.mark.parametrize(
    ("path", "body", "status", "answer", "asked"),
    [
        ("/scale", {"pool": "decode", "replicas": 3}, 200, {"pool": "decode", "replicas": 3}, ("decode", 3)),
        ("/scale", {"pool": "other", "replicas": 3}, 400, "there is no pool 'other'", None),
        ("/scale", {"pool": "decode", "replicas": 0}, 400, "replicas", None),
        ("/scale", {"pool": "decode"}, 400, "replicas", None),
        (
            "/move",
            {"source": "a", "target": "b", "gang_id": "a-1"},
            200,
            {"gang_id": "a-1", "source": "a", "target": "b"},
            ("a", "b", "a-1", None),
        ),
        ("/move", {"source": "a", "target": "b", "timeout_s": 0}, 503, "still has requests", None),
        ("/move", {"source": "a", "target": "b", "timeout_s": -1}, 400, "timeout_s", None),
        ("/update", {"config": {"model": "m"}}, 200, {"replaced_pools": ["main"]}, ({"model": "m"},)),
        ("/update", {"config": 3}, 400, "config", None),
    ],
)
def test_what_routes_ask_and_answer(
    path: str, body: dict[str, Any], status: int, answer: object, asked: tuple[Any, ...] | None
) -> None:
    control = _Control()

    async def run() -> None:
        async with SmallAdmin(pool("main"), routes=pool_routes(control)).client() as client:
            response = await client.post(path, json=body)
            assert response.status_code == status, response.text
            if isinstance(answer, str):
                assert answer in response.json()["error"]["message"]
            else:
                assert response.json() == answer
            assert (await client.get(path)).status_code == 405

    asyncio.run(run())
    assert control.asked == ([] if asked is None else [asked])


def test_they_need_the_admin_key() -> None:
    control = _Control()
    keys = AdminKeys([digest_of("admin-key-of-sixteen")], False, "127.0.0.1")

    async def run() -> None:
        async with SmallAdmin(pool("main"), routes=pool_routes(control), keys=keys).client() as client:
            for path in ("/scale", "/move", "/update"):
                assert (await client.post(path, json={})).status_code == 401

    asyncio.run(run())
    assert control.asked == []
