"""A service over three hosts whose traffic is encrypted where it can be: routers and gangs, gangs among themselves,
clients, and operators."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from tensorweave.cluster.tls import TlsFiles, pinned_context
from tests.certificates import make_files
from tests.e2e.service_process import write_model
from tests.hosts.ray_cluster import RayCluster, wait_until
from tests.hosts.service import ADMIN_PORT, DRIVER, READY_TIMEOUT_S, Service, running_service, write_service
from tests.hosts.traffic import Traffic

pytestmark = pytest.mark.timeout(1200)
Note = Callable[[str], None]


@pytest.fixture(scope="module")
def files(cluster: RayCluster) -> TlsFiles:
    return make_files(cluster.logs / "tls")


@pytest.fixture(scope="module")
def model(cluster: RayCluster) -> Path:
    return write_model(cluster.logs / "model")


@pytest.fixture(scope="module")
def service(cluster: RayCluster, files: TlsFiles, model: Path) -> Iterator[Service]:
    _, second, third = cluster.hosts
    pools = {"prefill": {"placement": {"nodes": second.name}}, "decode": {"placement": {"nodes": third.name}}}
    listener = {"certificate": files.certificate, "key": files.key}
    config = write_service(
        cluster,
        model,
        pools,
        router={"host": cluster.head.address, "policy": "round_robin", "min_prefill_tokens": 8, "tls": listener},
        admin={"tls": listener},
        network={"tls": asdict(files)},
    )
    with running_service(cluster, "tls", config, files.certificate) as running:
        yield running


def test_requests_and_kv_are_encrypted(service: Service, files: TlsFiles, note: Note) -> None:
    service.await_gangs("decode", 1)
    assert service.hosts_of("decode") == [[service.cluster.hosts[2].address]]
    with Traffic(service.url, model="m", verify=pinned_context(files.certificate)) as traffic:
        traffic.await_requests(20)
        # Until the prefill gang is ready and the link to it measured, the decode gang computes prompts itself.
        wait_until(lambda: service.num_blocks_moved() > 0, 60, "KV moves, which gangs report with their next heartbeat")
    assert not traffic.seen.failures, traffic.seen.describe()
    note(f"{traffic.seen.describe()}; {service.num_blocks_moved()} KV blocks moved")


def test_clients_without_tls_are_not_answered(service: Service) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(service.url.replace("https://", "http://") + "/models", timeout=60)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{service.url}/models", timeout=60, verify=ssl.create_default_context())


def test_the_admin_page_chats_with_the_endpoint(service: Service, files: TlsFiles) -> None:
    body = '{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}'
    ask = ["curl", "-sS", "--max-time", "60", "--cacert", files.certificate, "-H", "content-type: application/json"]
    answer = service.cluster.head.run(
        [*ask, "-d", body, f"https://127.0.0.1:{ADMIN_PORT}/chat"], service.cluster.environment
    )
    assert "choices" in answer, answer


def test_a_gang_that_spans_hosts_is_refused(
    cluster: RayCluster, files: TlsFiles, model: Path, service: Service
) -> None:
    service.job.stop()
    cluster.await_nothing_left()
    placement = {"nodes": [host.name for host in cluster.hosts[1:]], "spread": "ranks"}
    pools = {"main": {"tensor_parallel_size": 2, "placement": placement}}
    config = write_service(cluster, model, pools, network={"tls": asdict(files)})
    job = cluster.submit("spans", *DRIVER, "--config", str(config))
    assert job.await_end(READY_TIMEOUT_S) == "FAILED"
    [why] = [line for line in job.own_lines() if "cannot start" in line]
    assert "gloo and NCCL, which connect its ranks, do not encrypt" in why
    wait_until(lambda: not cluster.ours(), 90, "nothing is left")
