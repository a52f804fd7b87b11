"""Each way from a prefill gang to a decode gang is measured once, one at a time, and a bad one is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tensorweave.cluster import kv_links
from tensorweave.cluster.kv_links import MAX_SOURCES, KvLinkTable, ReadyGang
from tensorweave.cluster.protocol import GangAddress, KvEndpoint, KvSource, LinkMeasurement, ModelInfo, Role

_INFO = ModelInfo("fake", 10, 10, "float32", 2, 5)


class _Measuring:
    """A gang whose links are what the test says."""

    def __init__(self, gang_id: str, link: LinkMeasurement) -> None:
        self.gang_id = gang_id
        self.link = link
        self.sources: list[str] = []
        self.num_now = 0

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        assert self.num_now == 0
        self.num_now += 1
        await asyncio.sleep(0)
        self.sources.append(source.gang_id)
        self.num_now -= 1
        return self.link

    async def start(self) -> GangAddress:
        raise AssertionError

    async def watch(self) -> str:
        raise AssertionError

    async def drain(self, timeout_s: float) -> None:
        raise AssertionError

    async def kill(self) -> None:
        raise AssertionError

    def describe(self) -> dict[str, Any]:
        raise AssertionError


def _gang(gang_id: str, role: Role, link: LinkMeasurement | None = None) -> ReadyGang:
    source = KvSource(gang_id, (KvEndpoint("127.0.0.1", 1, 0, 2),), {}, "s")
    address = GangAddress(gang_id, 1, role, "127.0.0.1", 1, "s", _INFO, source)
    return _Measuring(gang_id, link or LinkMeasurement(1e9, 0.001)), address


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not is_so():
            await asyncio.sleep(0)


async def _settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_new_pairs_are_measured_once_and_lost_ones_forgotten() -> None:
    async def body() -> None:
        changes: list[int] = []
        links = KvLinkTable(lambda: changes.append(len(links.all)))
        one, two = _gang("d1", "decode"), _gang("d2", "decode")
        first, second, whole = _gang("p1", "prefill"), _gang("p2", "prefill"), _gang("b", "both")
        links.update([one, first, whole])
        links.update([one, first, whole])
        await _settled()
        assert set(links.all) == {("d1", "p1")}
        links.update([one, two, first, second])
        await _settled()
        assert set(links.all) == {(d, p) for d in ("d1", "d2") for p in ("p1", "p2")}
        receiver = one[0]
        assert isinstance(receiver, _Measuring)
        assert sorted(receiver.sources) == ["p1", "p2"], "each once"
        assert changes == [1, 2, 3, 4]
        links.update([two, second])
        assert set(links.all) == {("d2", "p2")}
        described = {"megabytes_per_s": 1000.0, "latency_ms": 1.0, "error": None, "transport": "", "shortfall": None}
        assert links.describe("d2") == {"p2": {**described, "address": "127.0.0.1"}}
        links.close()

    asyncio.run(body())


def test_with_many_prefill_gangs_each_decode_gang_is_measured_with_some_and_routers_are_told_now_and_then() -> None:
    async def body() -> None:
        num_changes = 0

        def change() -> None:
            nonlocal num_changes
            num_changes += 1

        links = KvLinkTable(change)
        prefill = [_gang(f"p{i}", "prefill") for i in range(2 * MAX_SOURCES)]
        decode = [_gang(f"d{i}", "decode") for i in range(4)]
        links.update([*prefill, *decode])
        await _until(lambda: len(links.all) == 4 * MAX_SOURCES)
        await _settled()
        assert [len(links.describe(f"d{i}")) for i in range(4)] == [MAX_SOURCES] * 4
        assert len({source for _, source in links.all}) == len(prefill), "decode gangs have different ones"
        assert 1 < num_changes < 3 * MAX_SOURCES, "of 4 * MAX_SOURCES measurements"
        links.update([*prefill[1:], *decode])
        await _until(lambda: len(links.all) == 4 * MAX_SOURCES)
        assert all(source != "p0" for _, source in links.all), "another takes the place of one that is gone"
        assert all(len(set(gang.sources)) == len(gang.sources) for gang, _ in decode if isinstance(gang, _Measuring))

    asyncio.run(body())


def test_a_measurement_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_links, "RETRY_AFTER_S", (0.0, 0.0, 0.0))

    async def body() -> None:
        links = KvLinkTable(lambda: None)
        slow_to_wake, broken = (_gang(name, "decode", LinkMeasurement(0, 0, "silent")) for name in ("d1", "d2"))
        one, two = slow_to_wake[0], broken[0]
        assert isinstance(one, _Measuring)
        assert isinstance(two, _Measuring)
        links.update([slow_to_wake, broken, _gang("p", "prefill")])
        await _until(lambda: len(one.sources) == 2)
        one.link = LinkMeasurement(1e9, 0.001)
        await _until(lambda: links.all["d1", "p"].error is None)
        await _until(lambda: len(two.sources) == 4)
        await _settled()
        assert (len(two.sources), links.all["d2", "p"].error) == (4, "silent"), "not for ever"
        links.close()

    asyncio.run(body())


def test_slow_and_broken_links_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        links = KvLinkTable(lambda: None)
        slow, short, broken = (
            _gang("slow", "decode", LinkMeasurement(5e6, 0.2)),
            _gang(
                "short",
                "decode",
                LinkMeasurement(6e10, 1e-4, transport="ipc_direct", shortfall="60 GB/s over 18 NVLinks"),
            ),
            _gang("broken", "decode", LinkMeasurement(0, 0, "refused")),
        )
        links.update([slow, short, broken, _gang("fine", "decode"), _gang("p", "prefill")])
        await _settled()
        assert len(links.all) == 4
        assert links.describe("broken")["p"]["error"] == "refused"

    name = "tensorweave.cluster.kv_links"
    with caplog.at_level(logging.WARNING, name):
        asyncio.run(body())
    assert [record.getMessage().split(" (slow")[0] for record in caplog.records if record.name == name] == [
        "KV from gang p to gang slow: 5 MB/s, 200.00 ms",
        "KV from gang p to gang short: 60000 MB/s, 0.10 ms over ipc_direct (60 GB/s over 18 NVLinks)",
        "no KV can be sent from gang p to gang broken: refused",
    ]
