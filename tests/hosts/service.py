"""A service on the hosts, submitted as a job."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hosts.network import Host
from tests.hosts.ray_cluster import REPOSITORY, Job, RayCluster, wait_until

READY_TIMEOUT_S = 600.0
PORT = 8000
ADMIN_PORT = 8200
DRIVER = ("python", "-m", "tensorweave.cli.main", "serve")


def write_service(
    cluster: RayCluster, model: str | Path, pools: Mapping[str, Any], **tables: Mapping[str, Any]
) -> Path:
    """A file that every host sees (YAML reads JSON)."""
    settings = {
        "model": str(model),
        "served_model_name": "m",
        "engine": {
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 1,
            # Without reuse, so that prompts that come again are computed, and their KV moves, again.
            "kv_cache_config": {"max_tokens": 16384, "enable_block_reuse": False},
        },
        "pools": pools,
        "router": {"host": cluster.head.address, "port": PORT},
        "ray": {"address": "auto"},
        **tables,
    }
    settings["limits"] = {"start_timeout_s": READY_TIMEOUT_S, **tables.get("limits", {})}
    path = cluster.logs / "service.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


@contextmanager
def without_package(*hosts: Host) -> Iterator[None]:
    """Those hosts lack our package."""
    package = str(REPOSITORY / "tensorweave")
    for host in hosts:
        host.run(["mount", "-t", "tmpfs", "tmpfs", package], os.environ)
    try:
        yield
    finally:
        for host in hosts:
            host.run(["umount", package], os.environ)


class Service:
    """`job` is its driver, `certificate` that of its HTTPS listeners, if they are such."""

    def __init__(self, cluster: RayCluster, job: Job, certificate: str | None = None) -> None:
        self.cluster = cluster
        self.job = job
        self.certificate = certificate
        scheme = "http" if certificate is None else "https"
        self.url = f"{scheme}://{cluster.head.address}:{PORT}/v1"

    def pools(self) -> dict[str, dict[str, Any]]:
        """As the admin port describes them; none while it does not answer."""
        trust = [] if self.certificate is None else ["--cacert", self.certificate]
        scheme = "http" if self.certificate is None else "https"
        ask = ["curl", "-s", "--max-time", "15", *trust, f"{scheme}://127.0.0.1:{ADMIN_PORT}/health"]
        try:
            shown = self.cluster.head.run(ask, self.cluster.environment)
            return {pool["pool"]: pool for pool in json.loads(shown)["pools"]}
        except (AssertionError, ValueError, KeyError):
            return {}

    def gangs(self, pool: str) -> list[dict[str, Any]]:
        return list(self.pools().get(pool, {}).get("gangs", ()))

    def hosts_of(self, pool: str) -> list[list[str]]:
        """The addresses of the ranks of each gang that is ready."""
        return [[rank["node_ip"] for rank in gang["ranks"]] for gang in self.gangs(pool) if gang["state"] == "ready"]

    def link_to(self, gang_id: str) -> dict[str, Any]:
        """What the self-test measured on the way from the prefill gang to this one."""
        [gang] = [gang for gang in self.gangs("decode") if gang.get("gang_id") == gang_id] or [{}]
        return dict(gang.get("kv_links", {}))

    def await_gangs(self, pool: str, count: int, timeout_s: float = READY_TIMEOUT_S) -> float:
        return wait_until(
            lambda: len(self.hosts_of(pool)) == count, timeout_s, lambda: f"{count} gangs of {pool}: {self.gangs(pool)}"
        )

    def bring_back(self, host: Host, pools: Mapping[str, int]) -> float:
        """Turn a lost host on; return after how many seconds each pool has its gangs again."""
        started_s = time.monotonic()
        host.revive()
        self.cluster.start_ray(host)
        self.cluster.await_nodes(len(self.cluster.hosts))
        for pool, count in pools.items():
            self.await_gangs(pool, count)
        return time.monotonic() - started_s

    def num_blocks_moved(self) -> int:
        """KV blocks that the decode gangs of now have fetched."""
        ranks = [rank for gang in self.gangs("decode") for rank in gang.get("ranks", ())]
        return int(sum(rank["gauges"].get("kv_transfer_blocks_total", 0) for rank in ranks))


@contextmanager
def running_service(cluster: RayCluster, name: str, config: Path, certificate: str | None = None) -> Iterator[Service]:
    job = cluster.submit(name, *DRIVER, "--config", str(config))
    try:
        job.await_line("ready: ", READY_TIMEOUT_S + 60)
        yield Service(cluster, job, certificate)
    except BaseException:
        print(job.logs())
        raise
    finally:
        job.stop()
        cluster.await_nothing_left()
