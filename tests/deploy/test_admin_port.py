"""The admin port takes its port once that is free, and router replicas report whatever becomes of their reports."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from tensorweave.cluster.router_report import RouterReport
from tensorweave.cluster.tls import check_listener_files, pinned_context
from tensorweave.deploy import admin_port, router_reports
from tensorweave.deploy.admin_port import AdminPort
from tensorweave.deploy.config_tls import ListenerTlsConfig
from tests.certificates import make_files
from tests.router.admin.small_admin import SmallAdmin, pool

OWN_HOST = "127.77.1.10"
"""A loopback address where nobody else takes a port that we have just let go."""
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_port, "_CLOSE_TIMEOUT_S", PATIENCE_S)


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


def test_https_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    """A client that expects this certificate is answered, one that trusts others is not."""
    files, other = make_files(tmp_path / "own"), make_files(tmp_path / "other")
    with socket.create_server((OWN_HOST, 0)) as free:
        port = free.getsockname()[1]
    tls = ListenerTlsConfig(certificate=files.certificate, key=files.key)
    listening = AdminPort(OWN_HOST, port, lambda: SmallAdmin(pool("main")).app, tls)
    listening.start()
    url = f"https://{OWN_HOST}:{port}/status"
    try:
        assert status_of(url, pinned_context(files.certificate)) == 200
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(url, trust_env=False, verify=pinned_context(other.certificate), timeout=PATIENCE_S)
    finally:
        listening.close()


def test_files_that_no_listener_can_use_are_named(tmp_path: Path) -> None:
    files, other = make_files(tmp_path / "own"), make_files(tmp_path / "other")
    check_listener_files("router.tls", files.certificate, files.key)
    with pytest.raises(ValueError, match=r"^router\.tls\.certificate cannot be read: /nowhere: No such file"):
        check_listener_files("router.tls", "/nowhere", files.key)
    with pytest.raises(ValueError, match=r"^admin\.tls\.certificate and key are no PEM files that match: "):
        check_listener_files("admin.tls", files.certificate, other.key)


def status_of(url: str, verify: ssl.SSLContext | bool = True) -> int:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return httpx.get(url, trust_env=False, verify=verify).status_code
        except httpx.TransportError:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_one_that_has_not_got_its_port_can_be_closed() -> None:
    with socket.create_server((OWN_HOST, 0)) as other:
        listening = AdminPort(OWN_HOST, other.getsockname()[1], lambda: SmallAdmin().app)
        listening.start()
        listening.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "admin-port"]


def test_one_that_is_closed_while_it_starts_ends() -> None:
    is_building, may_build = threading.Event(), threading.Event()

    def build() -> ASGIApp:
        is_building.set()
        assert may_build.wait(PATIENCE_S)
        return SmallAdmin().app

    listening = AdminPort(OWN_HOST, 0, build)
    listening.start()
    assert is_building.wait(PATIENCE_S)
    closing = threading.Thread(target=listening.close)
    closing.start()
    assert listening._is_closing.wait(PATIENCE_S)
    may_build.set()
    closing.join(PATIENCE_S)
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
