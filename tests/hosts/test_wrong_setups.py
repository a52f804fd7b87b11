"""Set-ups that cannot work: each ends soon with one clear message and exit code 1, and leaves nothing running.

Three hosts, with a driver on the first one or, where that makes a difference, a job. `LIMIT_S` is what is promised on a
machine that is not busy; the test waits for longer.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.service_process import write_model
from tests.hosts.network import Host
from tests.hosts.ray_cluster import BIN, REPOSITORY, RayCluster, wait_until
from tests.hosts.service import PORT, without_package, write_service

pytestmark = pytest.mark.timeout(900)
Note = Callable[[str], None]
LIMIT_S = 60.0
PATIENCE_S = 300.0
TWO_HOSTS = {"main": {"tensor_parallel_size": 2, "placement": {"nodes": ["twc2", "twc3"], "spread": "ranks"}}}


@dataclass(frozen=True, slots=True)
class End:
    """How a driver has ended; `lines` are its own."""

    code: int
    seconds: float
    lines: list[str]

    @property
    def message(self) -> str:
        """The only line that says why."""
        [why] = [line for line in self.lines if "cannot start: " in line or "stopped before" in line]
        assert why == self.lines[-1], self.lines
        return why


class Driver:
    """`tensorweave serve` on the first host."""

    def __init__(self, cluster: RayCluster, config: Path, *changes: str, **variables: str) -> None:
        self._cluster = cluster
        self._log = cluster.logs / "driver.log"
        self._log.unlink(missing_ok=True)
        changed = [part for change in changes for part in ("--set", change)]
        command = [str(BIN / "python"), "-m", "tensorweave.cli.main", "serve", "--config", str(config), *changed]
        environment = {**cluster.environment, "PYTHONPATH": str(REPOSITORY), **variables}
        self._started_s = time.monotonic()
        self._process = cluster.head.start(command, environment, self._log)

    @property
    def lines(self) -> list[str]:
        text = self._log.read_text(errors="replace")
        return [line for line in text.splitlines() if line.startswith("tensorweave: ")]

    def await_line(self, part: str) -> None:
        wait_until(lambda: any(part in line for line in self.lines), PATIENCE_S, lambda: f"{part!r}: {self.text()}")

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """To the driver itself, which is the child of the program that has entered the host."""
        [child] = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        os.kill(int(child), number)

    def end(self) -> End:
        """Wait for it, and until nothing of it is left anywhere."""
        try:
            code = self._process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on: {self.text()}") from None
        seconds = time.monotonic() - self._started_s
        self._cluster.await_nothing_left()
        return End(code, seconds, self.lines)


@pytest.fixture(scope="module")
def model(cluster: RayCluster) -> Path:
    return write_model(cluster.logs / "model")


@pytest.fixture
def refused(cluster: RayCluster, model: Path, note: Note) -> Callable[..., str]:
    """Start a driver that must be refused; return its message."""

    def attempt(pools: Mapping[str, object], *changes: str, model: Path = model, **variables: str) -> str:
        driver = Driver(cluster, write_service(cluster, model, pools), *changes, **variables)
        end = driver.end()
        assert end.code == 1, driver.text()
        note(f"{end.seconds:.0f} s: {end.message}")
        return end.message

    return attempt


def test_too_few_cpus(refused: Callable[..., str]) -> None:
    assert "need 9 CPUs, and the Ray cluster has 3" in refused({"main": {"replicas": 9}})


def test_too_few_gpus(refused: Callable[..., str]) -> None:
    assert "need 1 CPUs, and" not in (why := refused({"main": {"device": "cuda"}}))
    assert "1 GPUs, and the Ray cluster has 0" in why


def test_a_host_without_the_model(cluster: RayCluster, model: Path, refused: Callable[..., str]) -> None:
    for host in cluster.hosts[:2]:
        shutil.copytree(model, host.tmp / "model")
    why = refused(TWO_HOSTS, model=Path("/tmp/model"))
    assert cluster.hosts[2].address in why
    assert "/tmp/model" in why


def test_a_host_without_room_for_its_pool(refused: Callable[..., str]) -> None:
    assert "placement.nodes (twc9) allows hold 0 such" in refused({"main": {"placement": {"nodes": "twc9"}}})


def test_a_port_that_is_taken(cluster: RayCluster, refused: Callable[..., str]) -> None:
    listen = f"import socket, time; s = socket.create_server(('{cluster.head.address}', {PORT})); time.sleep(900)"
    listener = cluster.head.start([str(BIN / "python"), "-c", listen], cluster.environment, cluster.logs / "listener")
    try:
        wait_until(lambda: str(PORT) in cluster.head.run(["ss", "-ltn"], os.environ), 60, "somebody listens")
        assert f"port {PORT} of {cluster.head.address} is taken" in refused({"main": {}})
    finally:
        listener.kill()
        cluster.head.kill("create_server")
        listener.wait(timeout=30)


def test_a_wrong_token(refused: Callable[..., str]) -> None:
    assert "refuses our token" in refused({"main": {}}, RAY_AUTH_TOKEN="0" * 64)


def test_no_token(refused: Callable[..., str]) -> None:
    assert "refuses our token" in refused({"main": {}}, RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")


@contextmanager
def other_version(host: Host) -> Iterator[None]:
    """That host's clone has another version than the others'."""
    source = REPOSITORY / "tensorweave" / "__init__.py"
    changed = host.root / "other_init.py"
    changed.write_text(re.sub(r'__version__(.*)= ".*"', r'__version__\1= "9.9.9"', source.read_text()))
    assert "9.9.9" in changed.read_text()
    host.run(["mount", "--bind", str(changed), str(source)], os.environ)
    try:
        yield
    finally:
        host.run(["umount", str(source)], os.environ)


def test_mixed_versions(cluster: RayCluster, refused: Callable[..., str]) -> None:
    third = cluster.hosts[2]
    with other_version(third):
        why = refused(TWO_HOSTS)
    assert re.search(rf"rank \d \(pid \d+ on {third.address}\) has tensorweave 9\.9\.9", why)


def test_a_full_disk(cluster: RayCluster, refused: Callable[..., str]) -> None:
    """A Ray of its own finds no room for its session."""
    head = cluster.head
    full = head.tmp / "full"
    full.mkdir()
    head.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp/full"], os.environ)
    try:
        why = refused({"main": {}}, "ray.address=local", RAY_TMPDIR="/tmp/full", TMPDIR="/tmp/full")
        assert "No space left on device" in why
        assert "/tmp/full" in why
    finally:
        head.run(["umount", "/tmp/full"], os.environ)


def test_a_peer_that_cannot_be_reached(cluster: RayCluster, refused: Callable[..., str]) -> None:
    """The two hosts of a gang reach the head, and not each other."""
    second, third = cluster.hosts[1:]
    pairs = ((second, third), (third, second))
    for host, other in pairs:
        host.run(["ip", "route", "add", "blackhole", f"{other.address}/32"], os.environ)
    try:
        why = refused(TWO_HOSTS, "limits.start_timeout_s=50")
        assert second.address in why or third.address in why
    finally:
        for host, other in pairs:
            host.run(["ip", "route", "del", "blackhole", f"{other.address}/32"], os.environ)


def test_a_wrong_file(cluster: RayCluster, note: Note) -> None:
    path = cluster.logs / "wrong.yaml"
    path.write_text("model: m\npools:\n  main:\n    replicsa: 2\n    tensor_parallel_size: two\n")
    job = cluster.submit("wrong-file", "python", "-m", "tensorweave.cli.main", "serve", "--config", str(path))
    assert job.await_end(PATIENCE_S) == "FAILED"
    seconds = time.monotonic() - job.submitted_s
    text = job.logs()
    assert f"{path}:4: " in text
    assert "did you mean 'replicas'?" in text
    assert f"{path}:5: " in text
    assert "Traceback" not in text
    note(f"{seconds:.0f} s: {job.own_lines()}")
    cluster.await_nothing_left()


def test_no_ray_at_the_address(refused: Callable[..., str]) -> None:
    why = refused({"main": {}}, "ray.address=10.79.0.12:6399")
    assert "no Ray head listens at 10.79.0.12:6399" in why


def test_a_host_that_is_not_there(refused: Callable[..., str]) -> None:
    assert "no Ray head listens at 10.79.0.77:6379" in refused({"main": {}}, "ray.address=10.79.0.77:6379")


def test_a_job_is_stopped_in_mid_start(cluster: RayCluster, model: Path, note: Note) -> None:
    config = write_service(cluster, model, {"main": {"replicas": 3}})
    job = cluster.submit("mid-start", "python", "-m", "tensorweave.cli.main", "serve", "--config", str(config))
    job.await_line("starting", PATIENCE_S)
    started_s = time.monotonic()
    job.stop()
    assert job.await_end(PATIENCE_S) in ("STOPPED", "FAILED")
    cluster.await_nothing_left()
    note(f"nothing left {time.monotonic() - started_s:.0f} s after `ray job stop`: {job.own_lines()[-1:]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_the_driver_is_ended_in_mid_start(cluster: RayCluster, model: Path, note: Note, number: signal.Signals) -> None:
    driver = Driver(cluster, write_service(cluster, model, {"main": {"replicas": 3}}))
    driver.await_line("starting")
    started_s = time.monotonic()
    driver.signal(number)
    end = driver.end()
    note(f"nothing left {time.monotonic() - started_s:.0f} s after it; code {end.code}: {end.lines[-1:]}")
    assert end.code != 0
    if number == signal.SIGTERM:
        assert "stopped before it was ready" in end.message


def test_a_host_without_the_package(cluster: RayCluster, refused: Callable[..., str]) -> None:
    third = cluster.hosts[2]
    with without_package(third):
        why = refused(TWO_HOSTS)
    assert third.address in why
    assert "No module named 'tensorweave" in why
