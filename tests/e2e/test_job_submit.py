"""The same file through `ray job submit --working-dir .` to a cluster that already runs: it serves, and `ray job stop`,
which kills the driver after 3 s, lets a running request finish and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.service_process import (
    REPOSITORY,
    alive,
    complete,
    free_ports,
    get_status,
    num_generated,
    wait_until,
    write_config,
    write_model,
)

BIN = Path(sys.executable).parent
TIMEOUT_S = 90.0
OURS = ("Guardian", "Anchor", "ServeController", "ProxyActor", "ServeReplica", "PoolSupervisor", "RankWorker")


def ray(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(BIN / "ray"), *arguments],
        cwd=REPOSITORY,
        env=environment,
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def processes_of(temp_dir: Path) -> list[psutil.Process]:
    """The processes of the Ray that lives in `temp_dir`: those that name it, and their children."""
    roots = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(temp_dir) in part for part in process.info["cmdline"] or ())
    ]
    return list({process for root in roots for process in (root, *children_of(root))})


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_ours(process: psutil.Process) -> bool:
    try:
        return any(name in " ".join(process.cmdline()) for name in OURS)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def cluster() -> Iterator[tuple[str, Path]]:
    """A running Ray head: the address of its job server, and its directory (short: sockets live in it)."""
    temp_dir = Path("/tmp") / f"twj{os.getpid()}"
    gcs, dashboard, agent, client = free_ports(4)
    ray(
        *("start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2", "--disable-usage-stats"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={temp_dir}"),
        *(f"--ray-client-server-port={client}", "--min-worker-port=40000", "--max-worker-port=42000"),
    )
    try:
        yield f"http://127.0.0.1:{dashboard}", temp_dir
    finally:
        ended = processes_of(temp_dir)
        for process in ended:
            process.terminate()
        for process in psutil.wait_procs(ended, timeout=10)[1]:
            process.kill()
        subprocess.run(["rm", "-rf", str(temp_dir)], check=True, timeout=30)


def test_submitted_service_serves_and_stops(cluster: tuple[str, Path], tmp_path: Path) -> None:
    address, temp_dir = cluster
    config, port, proxy_port = write_config(tmp_path, write_model(tmp_path / "model"))
    ray(
        *("job", "submit", "--no-wait", "--submission-id", "serve", "--address", address, "--working-dir", "."),
        *("--", "python", "-m", "tensorweave.cli.main", "serve", "--config", str(config)),
    )
    try:
        wait_until(lambda: get_status(port, "/ready") == 200, TIMEOUT_S, "the submitted service is ready")
    except AssertionError as error:
        raise AssertionError(ray("job", "logs", "--address", address, "serve")) from error
    for door in (port, proxy_port):
        assert num_generated(complete(door)) == 4
    assert any(is_ours(process) for process in processes_of(temp_dir))

    outcome: dict[str, Any] = {}
    running = threading.Thread(target=lambda: outcome.update(long=complete(port, max_tokens=1500)))
    running.start()
    ray("job", "stop", "--address", address, "serve")
    running.join(timeout=TIMEOUT_S)
    assert num_generated(outcome["long"]) == 1500

    wait_until(
        lambda: not any(is_ours(process) for process in alive(processes_of(temp_dir))),
        TIMEOUT_S,
        "nothing of ours is left",
    )
    assert get_status(port, "/ready") is None
    assert get_status(proxy_port, "/ready") is None
    table = ray("list", "placement-groups", "--address", address, "--filter", "state=CREATED")
    assert "CREATED" not in table.replace("state=CREATED", "")
