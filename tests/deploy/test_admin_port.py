"""The admin port takes its port once that is free, and router replicas report whatever becomes of their reports."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import httpx
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from tensorweave.cluster.router_report import RouterReport
from tensorweave.deploy import admin_port, router_reports
from tensorweave.deploy.admin_port import AdminPort
from tests.router.admin.small_admin import SmallAdmin, pool

OWN_HOST = "127.77.1.10"
"""A loopback address where nobody else takes a port that we have just let go."""
PATIENCE_S = 60.0


def test_it_waits_for_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(admin_port, "_RETRY_S", 0.05)
    with socket.create_server((OWN_HOST, 0)) as other:
        port = other.getsockname()[1]
        listening = AdminPort(OWN_HOST, port, lambda: SmallAdmin(pool("main")).app)
        listening.start()
        deadline_s = time.monotonic() + PATIENCE_S
        while "in use" not in caplog.text:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    try:
        assert status_of(f"http://{OWN_HOST}:{port}/status") == 200
    finally:
        listening.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "admin-port"]


def status_of(url: str) -> int:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return httpx.get(url, trust_env=False).status_code
        except httpx.TransportError:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_one_that_has_not_got_its_port_can_be_closed() -> None:
    with socket.create_server((OWN_HOST, 0)) as other:
        listening = AdminPort(OWN_HOST, other.getsockname()[1], lambda: SmallAdmin().app)
        listening.start()
        listening.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "admin-port"]


def test_reports_go_on_whatever_becomes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_reports, "_REPORT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(router_reports, "IDLE_INTERVAL_S", 0.0)
    sent: list[int] = []

    async def send(report: RouterReport) -> float:
        sent.append(len(sent))
        match len(sent):
            case 2:
                raise RayActorError
            case 3:
                await asyncio.sleep(PATIENCE_S)
            case 4:
                raise RayServeException
            case 6:
                is_enough.set()
        return 0.0

    async def main() -> None:
        task = asyncio.create_task(router_reports.report_for_ever(lambda: RouterReport("r", 0.0, ()), send))
        async with asyncio.timeout(PATIENCE_S):
            await is_enough.wait()
        task.cancel()

    is_enough = asyncio.Event()
    asyncio.run(main())
    assert sent[:6] == [0, 1, 2, 3, 4, 5]
