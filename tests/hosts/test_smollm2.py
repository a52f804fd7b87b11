"""The real model over three hosts: prefill on the second, a decode gang of two ranks on the first and the third.

Its answers are the known ones, before and after the faults of a gang that has no second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from transformers import AutoTokenizer

from tensorweave.workers.store.model_store import resolve_model
from tests.e2e.test_smollm2 import GREEDY, IDS
from tests.hosts.ray_cluster import RayCluster, wait_until
from tests.hosts.service import Service, running_service, write_service
from tests.hosts.traffic import Traffic

pytestmark = [pytest.mark.model, pytest.mark.timeout(2400)]
Note = Callable[[str], None]
RECOVERY_S = 30.0
ANSWER_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def service(cluster: RayCluster) -> Iterator[Service]:
    first, second, third = (host.name for host in cluster.hosts)
    pools = {
        "prefill": {"placement": {"nodes": second}},
        "decode": {"tensor_parallel_size": 2, "placement": {"nodes": [first, third], "spread": "ranks"}},
    }
    router = {"host": cluster.head.address, "policy": "round_robin", "min_prefill_tokens": 8}
    config = write_service(cluster, "smollm2", pools, router=router, limits={"recovery_timeout_s": RECOVERY_S})
    with running_service(cluster, "smollm2", config) as running:
        yield running


def check_known_answers(service: Service) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    for question, ids in zip(GREEDY, IDS, strict=True):
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 64,
        }
        answer = httpx.post(f"{service.url}/chat/completions", json=body, timeout=ANSWER_TIMEOUT_S).json()
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert answer["usage"]["completion_tokens"] == len(ids)


def test_known_answers(service: Service, note: Note) -> None:
    first, second, third = (host.address for host in service.cluster.hosts)
    assert service.hosts_of("prefill") == [[second]]
    assert sorted(service.hosts_of("decode")[0]) == [first, third]
    started_s = time.monotonic()
    check_known_answers(service)
    assert service.num_blocks_moved() > 0
    seconds = time.monotonic() - started_s
    note(f"{len(IDS)} known answers in {seconds:.1f} s, {service.num_blocks_moved()} KV blocks moved")


def test_a_link_inside_the_gang_is_down_for_ten_seconds(service: Service, note: Note) -> None:
    third = service.cluster.hosts[2]
    with Traffic(service.url, model="m", clients=2, max_tokens=12) as traffic:
        traffic.await_requests(2)
        third.set_link(is_up=False)
        time.sleep(10)
        third.set_link(is_up=True)
        traffic.await_requests(4)
    service.await_gangs("decode", 1)
    note(traffic.seen.describe())
    assert all("503" in failure or "in a stream" in failure for failure in traffic.seen.failures)
    check_known_answers(service)


def test_a_slow_link_inside_the_gang(service: Service, note: Note) -> None:
    """It is slower, and the admin port says so."""
    third = service.cluster.hosts[2]
    third.throttle("10mbit")
    try:
        with Traffic(service.url, model="m", clients=2, max_tokens=12) as traffic:
            traffic.await_requests(4)
            link = service.gangs("decode")[0].get("link")
    finally:
        third.throttle(None)
    note(f"{traffic.seen.describe()}; the link inside the gang: {link}")
    assert not traffic.seen.failures


def test_gangs_are_lost_one_after_the_other_and_come_back(service: Service, note: Note) -> None:
    """Half of the decode gang: the prefill gang answers in its place. Then that, too: errors that say why."""
    cluster = service.cluster
    _, second, third = cluster.hosts
    with Traffic(service.url, model="m", clients=2, max_tokens=12) as traffic:
        traffic.await_requests(2)
        third.lose()
        traffic.await_requests(6)
        assert not traffic.seen.failures, traffic.seen.describe()
        second.lose()
        wait_until(lambda: len(traffic.seen.failures) >= 2, 180, "requests are answered with an error")
        traffic.stop_asking()
    note(traffic.seen.describe())
    for failure in traffic.seen.failures:
        assert "503" in failure or "in a stream" in failure
        assert "decode" in failure or "gang" in failure, failure
    started_s = time.monotonic()
    for host in (second, third):
        host.revive()
        cluster.start_ray(host)
    for pool in ("prefill", "decode"):
        service.await_gangs(pool, 1)
    check_known_answers(service)
    note(f"the known answers again {time.monotonic() - started_s:.0f} s after the hosts")
