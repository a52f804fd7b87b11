"""Ray over the hosts of `network`, with token authentication, and jobs that a machine outside submits to it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.hosts.network import Host, Network

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
GCS_PORT = 6379
DASHBOARD_PORT = 8265
JOIN_TIMEOUT_S = 300.0
OURS = ("ServiceActor", "ProcessSentinel", "ServeController", "ProxyActor", "ServeReplica", "Supervisor", "RankWorker")


def wait_until(
    holds: Callable[[], bool], timeout_s: float, what: str | Callable[[], str], every_s: float = 1.0
) -> float:
    """Wait until `holds()`; return the seconds."""
    started_s = time.monotonic()
    while not holds():
        if time.monotonic() - started_s > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
    return time.monotonic() - started_s


class RayCluster:
    """The head is on the first host. Its nodes are started by `tensorweave ray`."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.hosts = network.hosts
        self.token = secrets.token_hex(32)
        self.logs = network.root

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST", "PYTHONPATH"))}
        return {
            **kept,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            # Fewer and sooner processes: the hosts share this machine's cores.
            "RAY_worker_niceness": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Self:
        for number, host in enumerate(self.hosts, start=1):
            self.start_ray(host)
            self.await_nodes(number)
        return self

    def start_ray(self, host: Host) -> None:
        """Returns once it has joined."""
        command = [str(BIN / "tensorweave"), "ray", *self._start_arguments(host)]
        process = host.start(command, self.environment, self.logs / f"ray-{host.name}.log")
        wait_until(
            lambda: host.name in self.live_nodes() or process.poll() is not None,
            JOIN_TIMEOUT_S,
            lambda: f"Ray on {host.name}: {self.log_of(host)}",
        )
        assert process.poll() is None, f"Ray does not start on {host.name}: {self.log_of(host)}"

    def _start_arguments(self, host: Host) -> list[str]:
        common = ["--block", f"--node-ip-address={host.address}", "--num-cpus=1"]
        common += [f"--object-store-memory={128 << 20}", "--disable-usage-stats", f"--labels=host={host.name}"]
        if host is not self.head:
            return ["start", f"--address={self.address}", *common]
        dashboard = [f"--dashboard-host={host.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        return ["start", "--head", f"--port={GCS_PORT}", *dashboard, *common]

    def restart(self) -> None:
        """All hosts anew, and a new Ray on them."""
        self._reset_hosts()
        self.__enter__()

    def driver_log(self, job: str) -> str:
        """As it lies on the head's disk, even if nobody can be asked for it."""
        found = sorted(self.head.tmp.glob(f"ray/session_2*/logs/job-driver-{job}.log"))
        return found[-1].read_text(errors="replace") if found else ""

    def log_of(self, host: Host) -> str:
        return (self.logs / f"ray-{host.name}.log").read_text(errors="replace")[-3000:]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def live_nodes(self) -> list[str]:
        """Their names; none if the head does not answer."""
        try:
            return self._live_nodes()
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []

    def _live_nodes(self) -> list[str]:
        answer = httpx.get(f"{self.dashboard}/nodes?view=hostnamelist", headers=self.headers, timeout=20).json()
        return list(answer["data"]["hostNameList"])

    def await_nodes(self, count: int) -> None:
        def found() -> str:
            logs = "\n".join(self.log_of(host) for host in self.hosts)
            try:
                return f"{count} nodes: {self._live_nodes()}\n{logs}"
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                return f"{count} nodes: {type(error).__name__} {error}\n{logs}"

        wait_until(lambda: len(self.live_nodes()) == count, JOIN_TIMEOUT_S, found)

    def placement_groups(self) -> list[str]:
        answer = httpx.get(f"{self.dashboard}/api/v0/placement_groups", headers=self.headers, timeout=20).json()
        return [row["name"] for row in answer["data"]["result"]["result"] if row["state"] != "REMOVED"]

    def ours(self) -> list[str]:
        """Processes of ours on any host: none may be left once a service has ended."""
        lines = (line for host in self.hosts for line in host.processes().values())
        return [line for line in lines if any(f"ray::{name}" in line for name in OURS) or "tensorweave.cli" in line]

    def await_nothing_left(self, timeout_s: float = 90.0) -> float:
        """Return how long it took."""
        return wait_until(
            lambda: not self.ours() and not self.placement_groups(),
            timeout_s,
            lambda: f"nothing of ours left: {self.ours()} {self.placement_groups()}",
        )

    def ray(self, *arguments: str, timeout_s: float = 150.0) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, outside of the cluster."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments],
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def submit(self, name: str, *entrypoint: str, **options: Any) -> Job:
        return Job(self, name, *entrypoint, **options)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reset_hosts()

    def _reset_hosts(self) -> None:
        for host in self.hosts:
            host.end()
            host.revive()


class Job:
    """A job that `ray job submit` has started."""

    def __init__(
        self,
        cluster: RayCluster,
        name: str,
        *entrypoint: str,
        options: tuple[str, ...] = (),
        working_dir: Path = REPOSITORY,
    ) -> None:
        self.name = name
        self._cluster = cluster
        self.submitted_s = time.monotonic()
        done = cluster.ray(
            *("job", "submit", "--no-wait", "--submission-id", name, "--address", cluster.dashboard),
            *("--working-dir", str(working_dir), *options, "--", *entrypoint),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self) -> str:
        """Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        try:
            job = httpx.get(
                f"{self._cluster.dashboard}/api/jobs/{self.name}", headers=self._cluster.headers, timeout=20
            )
            return str(job.json()["status"])
        except (httpx.HTTPError, ValueError, KeyError):
            return "UNKNOWN"

    def logs(self) -> str:
        try:
            answer = httpx.get(
                f"{self._cluster.dashboard}/api/jobs/{self.name}/logs", headers=self._cluster.headers, timeout=20
            )
            return str(answer.json()["logs"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"(no logs: {error})"

    def own_lines(self) -> list[str]:
        """What the driver says."""
        return [line for line in self.logs().splitlines() if line.startswith("tensorweave: ")]

    def await_line(self, part: str, timeout_s: float) -> str:
        """The first line of the log that has `part`; fails at once if the job ends without it."""
        found: list[str] = []

        def has_come() -> bool:
            found.extend(line for line in self.logs().splitlines() if part in line)
            return bool(found) or self.status() in ("FAILED", "SUCCEEDED", "STOPPED")

        wait_until(has_come, timeout_s, lambda: f"{part!r} in the job's log:\n{self.logs()}")
        assert found, f"job {self.name} is {self.status()} without {part!r}:\n{self.logs()}"
        return found[0]

    def await_end(self, timeout_s: float) -> str:
        wait_until(
            lambda: self.status() in ("FAILED", "SUCCEEDED", "STOPPED"), timeout_s, lambda: f"an end:\n{self.logs()}"
        )
        return self.status()

    def stop(self) -> None:
        self._cluster.ray("job", "stop", "--address", self._cluster.dashboard, self.name)
