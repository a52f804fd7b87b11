"""The same file through `ray job submit --working-dir .` to a cluster that already runs: it serves, and `ray job stop`,
which kills the driver after 3 s, lets a running request finish and leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.e2e.service_process import (
    END_TIMEOUT_S,
    REPOSITORY,
    START_TIMEOUT_S,
    RunningAnswer,
    alive,
    command_of,
    complete,
    free_ports,
    get_status,
    num_generated,
    overlap_arguments,
    wait_until,
    write_config,
    write_model,
)

BIN = Path(sys.executable).parent
TIMEOUT_S = 150.0
TOKEN = secrets.token_hex(32)
DRIVER = "python -m tensorweave.cli.main serve"
OURS = (
    "ServiceActor",
    "ProcessSentinel",
    "ServeController",
    "ProxyActor",
    "ServeReplica",
    "PoolSupervisor",
    "RankWorker",
)

pytestmark = pytest.mark.timeout(900)


def ray(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
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
    return any(name in command_of(process) for name in OURS)


@pytest.fixture
def cluster() -> Iterator[tuple[str, Path]]:
    """A running Ray head: the address of its job server, and its directory (short: sockets live in it)."""
    temp_dir = Path("/tmp") / f"twj{os.getpid()}"
    gcs, dashboard, agent, client = free_ports(4)
    ray(
        *("start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2", "--disable-usage-stats"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={temp_dir}"),
        *(f"--ray-client-server-port={client}", "--min-worker-port=31100", "--max-worker-port=32700"),
    )
    try:
        yield f"http://127.0.0.1:{dashboard}", temp_dir
    finally:
        ended = processes_of(temp_dir)
        for process in ended:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(ended, timeout=10)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        subprocess.run(["rm", "-rf", str(temp_dir)], check=True, timeout=30)


def test_submitted_service_serves_and_stops(cluster: tuple[str, Path], tmp_path: Path) -> None:
    address, temp_dir = cluster
    config, port, proxy_port = write_config(tmp_path, write_model(tmp_path / "model"))
    ray(
        *("job", "submit", "--no-wait", "--submission-id", "serve", "--address", address, "--working-dir", "."),
        *("--", *DRIVER.split(), "--config", str(config), *overlap_arguments()),
    )
    try:
        wait_until(lambda: get_status(port, "/ready") == 200, START_TIMEOUT_S, "the submitted service is ready")
    except AssertionError as error:
        raise AssertionError(ray("job", "logs", "--address", address, "serve")) from error
    for listening_port in (port, proxy_port):
        assert num_generated(complete(listening_port)) == 4
    assert any(is_ours(process) for process in processes_of(temp_dir))

    long = RunningAnswer(port, max_tokens=1500)
    # A driver that handles no signal is killed while Ray restarts the killed service actor, which must notice by
    # itself.
    [service_actor] = [
        process for process in processes_of(temp_dir) if command_of(process).startswith("ray::ServiceActor")
    ]
    [driver] = [process for process in processes_of(temp_dir) if command_of(process).startswith(DRIVER)]
    driver.suspend()
    service_actor.kill()
    ray("job", "stop", "--address", address, "serve")
    assert long.num_generated() == 1500

    wait_until(
        lambda: not any(is_ours(process) for process in alive(processes_of(temp_dir))),
        END_TIMEOUT_S,
        "nothing of ours is left",
    )
    assert get_status(port, "/ready") is None
    assert get_status(proxy_port, "/ready") is None
    wait_until(lambda: not has_placement_groups(address), END_TIMEOUT_S, "no placement group is left")


def has_placement_groups(address: str) -> bool:
    table = ray("list", "placement-groups", "--address", address, "--filter", "state=CREATED")
    return "CREATED" in table.replace("state=CREATED", "")
