"""An admin app over pools that a test describes and routers that it reports of; clocks stand still until told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
from starlette.routing import BaseRoute

from tensorweave.cluster.errors import NotReady
from tensorweave.router.admin.access import AdminKeys
from tensorweave.router.admin.app import AdminService, build_admin_app
from tensorweave.router.admin.chat import ChatRelay
from tensorweave.router.admin.observer import Observer
from tensorweave.router.admin.router_table import RouterTable
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.router.http.request_record import RequestRecord
from tests.router.fake_fleet import FakeFleet

T = TypeVar("T")

MODEL = "org/tiny"
HOST = "10.77.0.11"


def rank(number: int = 0, **gauges: float) -> dict[str, Any]:
    return {
        "rank": number,
        "node_ip": HOST,
        "pid": 4000 + number,
        "progress_age_s": 0.1,
        "num_requests": 2,
        "num_open_files": 50,
        "gauges": gauges,
    }


def gang(gang_id: str, *ranks: dict[str, Any], state: str = "ready", **more: Any) -> dict[str, Any]:
    return {"gang_id": gang_id, "state": state, "epoch": 1, "reason": None, "starting": "", "ranks": ranks, **more}


def pool(name: str, *gangs: dict[str, Any], role: str = "both", **more: Any) -> dict[str, Any]:
    start: dict[str, Any] = {"pool": name, "role": role, "replicas": len(gangs), "gangs": gangs}
    return {**start, "failure": None, "trouble": None, "num_faults": 0, "events": [], **more}


class SmallAdmin:
    """`pools` is what the supervisor says; None: it does not answer. `now_s` is all clocks' time."""

    def __init__(
        self,
        *pools: dict[str, Any],
        keys: AdminKeys | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        chat_key: str | None = None,
        routes: Sequence[BaseRoute] = (),
        endpoint: str = "http://endpoint",
    ) -> None:
        self.pools: Sequence[dict[str, Any]] | None = pools
        self.now_s = 1000.0
        self.num_described = 0
        self.routers = RouterTable(lambda: self.now_s)
        observer = Observer(self._describe, self.routers, clock=lambda: self.now_s, wall_clock=lambda: self.now_s)
        chat = ChatRelay(endpoint, chat_key, transport)
        self.app = build_admin_app(
            AdminService(MODEL, "1.2.3", keys or AdminKeys(), observer, chat, heartbeat_limit_s=10.0, routes=routes)
        )

    async def _describe(self) -> Sequence[dict[str, Any]]:
        self.num_described += 1
        await asyncio.sleep(0)
        if self.pools is None:
            raise NotReady("the supervisor does not answer: GetTimeoutError")
        return self.pools

    def client(self, base_url: str = "http://127.0.0.1:8200", **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=base_url, **options)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[T]], **options: Any) -> T:
        async def running() -> T:
            async with self.client(**options) as client:
                return await work(client)

        return asyncio.run(running())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(lambda client: client.get(path, **options))


def router_metrics() -> RouterMetrics:
    return RouterMetrics(MODEL, Dispatcher(FakeFleet()))


def answered(metrics: RouterMetrics, path: str) -> None:
    record = RequestRecord("r", path, 0.0)
    record.end(200)
    metrics.count_answer(record)
