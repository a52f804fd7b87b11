"""A service over three hosts with a second gang for everything: no fault of a host or of a link fails a request.

One decode gang on the first host and one on the third, prefill on the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.service_process import write_model
from tests.hosts.ray_cluster import RayCluster, wait_until
from tests.hosts.service import DRIVER, READY_TIMEOUT_S, Service, running_service, write_service
from tests.hosts.strangers import Strangers, ports_of, resident_mb
from tests.hosts.traffic import Traffic

pytestmark = pytest.mark.timeout(1800)
Note = Callable[[str], None]
LONGEST_WAIT_S = 60.0
MOST_GROWTH_MB = 64.0
LEASE_S = 120.0
"""How long a rank serves on without its supervisor."""


@pytest.fixture(scope="module")
def service(cluster: RayCluster) -> Iterator[Service]:
    _, second, third = cluster.hosts
    pools = {
        "prefill": {"placement": {"labels": {"host": second.name}}},
        "decode": {"replicas": 2, "placement": {"nodes": [cluster.head.name, third.address], "spread": "gangs"}},
    }
    model = write_model(cluster.logs / "model")
    config = write_service(cluster, model, pools, router={"host": cluster.head.address, "policy": "round_robin"})
    with running_service(cluster, "faults", config) as running:
        yield running


@pytest.fixture
def traffic(service: Service) -> Iterator[Traffic]:
    with Traffic(service.url, model="m") as running:
        running.await_requests(8)
        yield running


def check(traffic: Traffic) -> None:
    assert not traffic.seen.failures, traffic.seen.describe()
    assert traffic.seen.longest_wait_s < LONGEST_WAIT_S, traffic.seen.describe()


def test_gangs_are_where_they_were_told_to_be(service: Service, note: Note) -> None:
    first, second, third = (host.address for host in service.cluster.hosts)
    service.await_gangs("decode", 2)
    assert service.hosts_of("prefill") == [[second]]
    assert sorted(service.hosts_of("decode")) == [[first], [third]]
    assert any(f"from {second}" in line for line in service.job.own_lines() if "KV from" in line)
    for gang in service.gangs("decode"):
        wait_until(lambda gang_id=gang["gang_id"]: service.link_to(gang_id), 60, "the links are measured")  # type: ignore[misc]
        note(f"{service.link_to(gang['gang_id'])}")


def test_a_host_is_lost_and_comes_back(service: Service, traffic: Traffic, note: Note) -> None:
    third = service.cluster.hosts[2]
    third.lose()
    traffic.await_requests(40)
    service.await_gangs("decode", 1)
    traffic.await_requests(20)
    seconds = service.bring_back(third, {"decode": 2})
    traffic.await_requests(20)
    note(f"{traffic.seen.describe()}; its gang is back {seconds:.0f} s after the host")
    check(traffic)


def test_the_only_prefill_host_is_lost_and_comes_back(service: Service, traffic: Traffic, note: Note) -> None:
    second = service.cluster.hosts[1]
    second.lose()
    traffic.await_requests(60)
    seconds = service.bring_back(second, {"prefill": 1})
    num_before = service.num_blocks_moved()
    traffic.await_requests(20)
    wait_until(lambda: service.num_blocks_moved() > num_before, 60, "KV moves from the new prefill gang")
    note(f"{traffic.seen.describe()}; its gang is back {seconds:.0f} s after the host")
    check(traffic)


@pytest.mark.parametrize("number", [2, 3])
def test_a_link_is_down_for_ten_seconds(service: Service, traffic: Traffic, note: Note, number: int) -> None:
    host = service.cluster.hosts[number - 1]
    host.set_link(is_up=False)
    time.sleep(10)
    host.set_link(is_up=True)
    traffic.await_requests(40)
    service.await_gangs("decode", 2)
    service.await_gangs("prefill", 1)
    note(traffic.seen.describe())
    check(traffic)


def test_a_slow_link(service: Service, traffic: Traffic, note: Note) -> None:
    third = service.cluster.hosts[2]
    third.throttle("10mbit")
    traffic.await_requests(60)
    third.throttle(None)
    traffic.await_requests(20)
    note(traffic.seen.describe())
    check(traffic)


@pytest.mark.parametrize("agent", ["DashboardAgent", "RuntimeEnvAgent"])
def test_an_agent_of_the_head_is_killed(service: Service, traffic: Traffic, note: Note, agent: str) -> None:
    """Ray's node would end with it; it is started again."""
    head = service.cluster.head
    nodes = set(service.cluster.live_nodes())
    [before] = head.find(f"ray::{agent}")
    assert head.kill(f"ray::{agent}") == 1
    started_s = time.monotonic()
    wait_until(lambda: head.find(f"ray::{agent}") not in ([], [before]), 120, "another agent")
    note(f"another {agent} {time.monotonic() - started_s:.0f} s later")
    traffic.await_requests(40)
    assert set(service.cluster.live_nodes()) == nodes
    wait_until(lambda: service.job.own_lines() != [], 60, "the job's log, which the dashboard's agent reads")
    assert service.job.status() == "RUNNING"
    note(traffic.seen.describe())
    check(traffic)


def test_strangers_at_every_port(service: Service, traffic: Traffic, note: Note) -> None:
    """The same processes go on, without a failed request, and have not grown."""
    hosts = service.cluster.hosts
    ports = {host: sorted(ports_of(host)) for host in hosts}
    assert all(ports.values())
    before = {host: resident_mb(host) for host in hosts}
    strangers = Strangers(ports)
    strangers.start()
    time.sleep(30)
    traffic.await_requests(20)
    strangers.stop()
    after = {host: resident_mb(host) for host in hosts}
    growth = max(after[host].get(pid, 0.0) - mb for host in hosts for pid, mb in before[host].items())
    sent = f"{strangers.num_connections} connections at {sum(map(len, ports.values()))} ports"
    note(f"{sent}, at most {growth:.0f} MB more; {traffic.seen.describe()}")
    assert {host: set(pids) for host, pids in after.items()} == {host: set(pids) for host, pids in before.items()}
    assert growth < MOST_GROWTH_MB
    check(traffic)


def test_the_job_drains_when_it_is_stopped(service: Service, note: Note) -> None:
    """Every answer that has begun ends whole; requests that come later are refused."""
    with Traffic(service.url, model="m", max_tokens=1500) as traffic:
        traffic.await_requests(4)
        started_s = time.monotonic()
        service.job.stop()
        wait_until(lambda: traffic.seen.failures != [], 120, "requests are refused")
    note(f"{traffic.seen.describe()}, after `ray job stop`; ended {time.monotonic() - started_s:.0f} s later")
    refused = ("503", "no connection", "Server disconnected without sending a response")
    cut = [failure for failure in traffic.seen.failures if not any(part in failure for part in refused)]
    assert not cut, cut
    seconds = service.cluster.await_nothing_left()
    note(f"nothing of the service left after another {seconds:.0f} s")


def test_ray_ends_on_the_head(cluster: RayCluster, note: Note) -> None:
    """All that is on the head ends with it: no router is left. Requests fail at once, nothing of the service stays, and
    a new Ray takes it again."""
    config = write_service(cluster, write_model(cluster.logs / "model"), {"main": {"placement": {"nodes": "twc2"}}})
    job = cluster.submit("headless", *DRIVER, "--config", str(config))
    job.await_line("ready: ", READY_TIMEOUT_S)
    with Traffic(Service(cluster, job).url, model="m") as traffic:
        traffic.await_requests(8)
        started_s = time.monotonic()
        assert cluster.head.kill("raylet/raylet ") == 1
        wait_until(lambda: len(traffic.seen.failures) >= 8, 60, "requests fail")
    note(f"{traffic.seen.describe()}; the driver's last words: {cluster.driver_log('agent').splitlines()[-2:]}")
    assert traffic.seen.longest_wait_s < LONGEST_WAIT_S
    wait_until(lambda: not cluster.ours(), LEASE_S + 60, lambda: f"nothing of it is left: {cluster.ours()}")
    note(f"nothing of it is left {time.monotonic() - started_s:.0f} s later")
    cluster.restart()
    with running_service(cluster, "again", config) as service, Traffic(service.url, model="m") as traffic:
        traffic.await_requests(8)
    assert not traffic.seen.failures
