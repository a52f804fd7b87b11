"""An agent that ends is started again with the ports that it had; the keeper ends with its raylet, or if no agent
starts."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import services

from tensorweave.cluster import ray_agent_keeper
from tensorweave.cluster.ray_internals import kept_agents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray's agents are kept on Linux")
PATIENCE_S = 60.0
KEEPER = Path(ray_agent_keeper.__file__)
AGENT = """
import os, sys, time
with open(sys.argv[1], "a") as file:
    print(os.getpid(), os.getppid(), os.environ["RAY_RAYLET_PID"], *sys.argv[2:], file=file)
time.sleep(600 if len(sys.argv) > 2 else 0)
sys.exit(7)
"""
RAYLET = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def starts(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def await_starts(log: Path, count: int) -> list[list[str]]:
    end_s = time.monotonic() + PATIENCE_S
    while len(found := starts(log)) < count:
        assert time.monotonic() < end_s, found
        time.sleep(0.05)
    return found


@pytest.fixture
def agent(tmp_path: Path) -> list[str]:
    script = tmp_path / "agent.py"
    script.write_text(AGENT)
    return [sys.executable, "-S", str(script), str(tmp_path / "log")]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def raylet(agent: list[str], tmp_path: Path, taken_port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A parent of the keeper."""
    options = [f"--session-dir={tmp_path}", "--node-id=n1", "--grpc-port=0", f"--listen-port={taken_port}"]
    keeper = [sys.executable, "-I", "-S", str(KEEPER), *agent, *options]
    with subprocess.Popen([sys.executable, "-S", "-c", RAYLET, *keeper], stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def test_an_agent_that_is_killed_comes_back_with_its_ports(
    raylet: subprocess.Popen[bytes], log: Path, tmp_path: Path, taken_port: int
) -> None:
    [(pid, parent, told, *arguments)] = await_starts(log, 1)
    assert parent == told, "an agent ends itself unless its parent is the process that it was told"
    ports = [(tmp_path / f"{name}_n1").read_text() for name in ("metrics_agent_port", "dashboard_agent_listen_port")]
    assert arguments[-2:] == [f"--grpc-port={ports[0]}", f"--listen-port={ports[1]}"]
    assert len({0, taken_port, *map(int, ports)}) == 4
    os.kill(int(pid), signal.SIGKILL)
    second = await_starts(log, 2)[1]
    assert second[0] != pid
    assert second[1] == parent
    assert second[3:] == arguments
    os.kill(int(second[0]), signal.SIGTERM)
    assert await_starts(log, 3)[2][3:] == arguments
    assert raylet.poll() is None
    os.kill(int(starts(log)[2][0]), signal.SIGKILL)


def test_the_keeper_ends_with_its_raylet(raylet: subprocess.Popen[bytes], log: Path) -> None:
    [(pid, keeper, *_)] = await_starts(log, 1)
    descriptor = os.pidfd_open(int(keeper))
    raylet.kill()
    try:
        assert select.select([descriptor], [], [], PATIENCE_S)[0], "it goes on"
    finally:
        os.close(descriptor)
        os.kill(int(pid), signal.SIGKILL)
    assert len(starts(log)) == 1


def test_an_agent_that_does_not_start_ends_the_node(
    agent: list[str], log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_agent_keeper, "PAUSE_S", 0.0)
    assert ray_agent_keeper.main(agent) == 7
    assert len(starts(log)) == ray_agent_keeper.MOST_QUICK_ENDS
    assert "agent.py has ended (code 7)" in capfd.readouterr().err


def test_an_agent_without_ports_gets_none(tmp_path: Path) -> None:
    command = ["python", "agent.py", f"--session-dir={tmp_path}", "--node-id=n1", "--grpc-port=0", "--minimal"]
    assert ray_agent_keeper.with_ports(command) == command
    assert list(tmp_path.iterdir()) == []


def test_ray_starts_its_agents_under_the_keeper() -> None:
    build = services._build_python_executable_command_memory_profileable
    plain = build("dashboard_agent", "/tmp")
    with kept_agents():
        kept = {name: services._build_python_executable_command_memory_profileable(name, "/tmp") for name in NAMES}
    assert (
        kept["dashboard_agent"]
        == kept["runtime_env_agent"]
        == [sys.executable, "-I", "-S", str(KEEPER.resolve()), *plain]
    )
    assert kept["log_monitor"] == plain
    assert services._build_python_executable_command_memory_profileable is build


NAMES = ("dashboard_agent", "runtime_env_agent", "log_monitor")
