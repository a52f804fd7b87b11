"""A gang whose ranks wait for the link between them says so: from the start, or once it has become slow."""

from __future__ import annotations

import logging

import pytest

from tensorweave.cluster.rank_link import RankLinkMonitor
from tensorweave.cluster.ranks import LinkRate, Traffic

LOGGER = "tensorweave.cluster.rank_link"
GOOD = LinkRate(latency_s=1e-4, bytes_per_s=1e9)


class _Gang:
    """A gang's link, and collectives of `wait_s` each at a stepped clock."""

    def __init__(self, rate: LinkRate) -> None:
        self.now_s = 0.0
        self.traffic = Traffic()
        self.link = RankLinkMonitor("g", rate, lambda: self.now_s)

    def run(self, wait_s: float, num_windows: int = 1, num_bytes: int = 2000) -> None:
        for _ in range(num_windows):
            self.now_s += 6.0
            had, calls = self.traffic, 200
            self.traffic = Traffic(had.seconds + calls * wait_s, had.calls + calls, had.num_bytes + calls * num_bytes)
            self.link.note(self.traffic)

    @property
    def slow(self) -> str | None:
        found: str | None = self.link.describe()["slow"]
        return found


def test_a_link_that_is_slow_at_the_start_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    gang = _Gang(LinkRate(latency_s=2e-4, bytes_per_s=1.2e6))  # 10 Mbit/s
    assert gang.slow is not None
    assert gang.slow.startswith("the link between its ranks carries 1.2 MB/s and takes 0.20 ms a collective: slow")
    [record] = [each for each in caplog.records if each.name == LOGGER]
    assert (record.levelno, record.getMessage()) == (logging.WARNING, f"gang g: {gang.slow}")
    assert _Gang(LinkRate(latency_s=5e-3, bytes_per_s=1e9)).slow is not None
    assert _Gang(GOOD).slow is None


def test_a_link_that_becomes_slow_is_reported_until_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    gang = _Gang(GOOD)
    gang.run(3e-4, num_windows=3)
    assert gang.slow is None
    gang.run(15e-3)
    assert gang.slow is None, "one window may be a paused host"
    gang.run(15e-3)
    assert gang.slow is not None
    assert gang.slow.startswith("a collective of its ranks takes 15.0 ms, and 0.10 ms by what was measured")
    assert [each.getMessage() for each in caplog.records if each.name == LOGGER] == [f"gang g: {gang.slow}"]
    assert gang.link.describe()["wait_ms"] == 15.0
    gang.run(3e-4)
    assert gang.slow is None


def test_large_collectives_may_take_longer() -> None:
    gang = _Gang(GOOD)
    gang.run(15e-3, num_windows=3, num_bytes=10_000_000)
    assert gang.slow is None


def test_too_little_traffic_is_not_judged() -> None:
    gang = _Gang(GOOD)
    for calls in range(1, 90, 10):
        gang.now_s += 60.0
        gang.link.note(Traffic(calls * 1.0, calls, calls))
    assert gang.slow is None
    assert gang.link.describe()["wait_ms"] is None
