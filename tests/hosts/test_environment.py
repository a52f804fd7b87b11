"""A cluster that has our package, and one that lacks it and gets it with the job. The commands are those of
docs/deployment.md."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.service_process import write_model
from tests.hosts.network import Host
from tests.hosts.ray_cluster import Job, RayCluster
from tests.hosts.service import PORT, Service, without_package, write_service
from tests.hosts.traffic import Traffic

pytestmark = pytest.mark.timeout(1200)
Note = Callable[[str], None]
TIMEOUT_S = 600.0
SPREAD = {"main": {"replicas": 2, "placement": {"nodes": ["twc2", "twc3"], "spread": "gangs"}}}


@pytest.fixture(scope="module")
def model(cluster: RayCluster) -> Path:
    return write_model(cluster.logs / "model")


def check(cluster: RayCluster, job: Job, note: Note, *, routers: Sequence[Host] = ()) -> None:
    """It serves, at each of the routers too."""
    try:
        job.await_line("ready: ", TIMEOUT_S)
        note(f"ready {time.monotonic() - job.submitted_s:.0f} s after it was submitted")
        service = Service(cluster, job)
        service.await_gangs("main", 2)  # it is ready with one of them
        assert sorted(service.hosts_of("main")) == [[host.address] for host in cluster.hosts[1:]]
        for url in (service.url, *(f"http://{host.address}:{PORT}/v1" for host in routers)):
            with Traffic(url, model="m") as traffic:
                traffic.await_requests(8)
            assert not traffic.seen.failures, traffic.seen.describe()
    finally:
        job.stop()
        cluster.await_nothing_left()


def test_the_cluster_has_the_package(cluster: RayCluster, model: Path, note: Note) -> None:
    """The job brings its file alone. There is a router on every host."""
    folder = cluster.logs / "job"
    folder.mkdir()
    router = {"host": "0.0.0.0", "port": PORT, "per_host": True}
    config = write_service(cluster, model, SPREAD, router=router).rename(folder / "service.yaml")
    command = ("tensorweave", "serve", "--config", config.name)
    check(cluster, cluster.submit("installed", *command, working_dir=folder), note, routers=cluster.hosts)


def test_the_package_comes_with_the_job(cluster: RayCluster, model: Path, note: Note) -> None:
    config = write_service(cluster, model, SPREAD)
    with without_package(*cluster.hosts):
        check(
            cluster,
            cluster.submit("brought", "python", "-m", "tensorweave.cli.main", "serve", "--config", str(config)),
            note,
        )


def test_pip_installs_the_package_for_the_job(cluster: RayCluster, model: Path, note: Note) -> None:
    """No index can be reached from these hosts: what is built with is what they have."""
    config = write_service(cluster, model, SPREAD)
    environment = {
        "pip": {
            "packages": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"],
            "pip_install_options": ["--no-build-isolation", "--no-deps"],
        }
    }
    options = ("--runtime-env-json", json.dumps(environment))
    with without_package(*cluster.hosts):
        job = cluster.submit("installs", "tensorweave", "serve", "--config", str(config), options=options)
        check(cluster, job, note)
