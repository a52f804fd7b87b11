"""`/health` depends on the gangs that answer requests, and not on the heartbeats of others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tensorweave.cluster.protocol import Role
from tensorweave.router.http.health import HealthReport, check_health
from tests.router.fake_fleet import FakeFleet, FakeLink
from tests.router.serving import model_info

LIMIT_S = 10.0


def gang(gang_id: str, age_s: float | None, *others_s: float, state: str = "ready") -> dict[str, Any]:
    ranks = [] if age_s is None else [{"progress_age_s": each, "gauges": {}} for each in (age_s, *others_s)]
    return {"gang_id": gang_id, "state": state, "ranks": ranks}


def pool(role: Role, *gangs: dict[str, Any]) -> dict[str, Any]:
    return {"pool": role, "role": role, "gangs": gangs, "failure": None, "trouble": None}


class DescribedFleet(FakeFleet):
    def __init__(self, *pools: dict[str, Any]) -> None:
        super().__init__(FakeLink(model_info()))
        self._pools = list(pools)

    async def describe(self) -> list[dict[str, Any]]:
        return self._pools


def report_of(*pools: dict[str, Any]) -> HealthReport:
    return asyncio.run(check_health(DescribedFleet(*pools), LIMIT_S))


@pytest.mark.parametrize(
    "pools",
    [
        [pool("both", gang("b", 31.0))],
        [pool("prefill", gang("p", 0.1)), pool("decode", gang("d", 31.0))],
        [pool("prefill", gang("p", 0.1)), pool("decode", gang("d", 0.1, 31.0))],
        [pool("prefill", gang("p", 0.1)), pool("decode", gang("d", 31.0), gang("e", None, state="restarting"))],
        [pool("prefill", gang("p", 31.0)), pool("decode", gang("d", None, state="failed"))],
    ],
)
def test_a_service_whose_answering_gangs_are_stuck_is_ill(pools: list[dict[str, Any]]) -> None:
    report = report_of(*pools)
    assert not report.is_healthy
    assert report.reason == "no step loop has made progress for 31.0 s"


@pytest.mark.parametrize(
    "pools",
    [
        [pool("both", gang("stuck", 31.0), gang("b", 0.1))],
        [pool("prefill", gang("stuck", 31.0)), pool("decode", gang("d", 0.1))],
    ],
)
def test_a_stuck_gang_that_others_make_up_for_is_told(pools: list[dict[str, Any]]) -> None:
    report = report_of(*pools)
    assert report.is_healthy
    assert report.reason == "gang stuck: its step loop has made no progress for 31.0 s"


def test_a_sound_service_has_nothing_to_tell() -> None:
    report = report_of(pool("prefill", gang("p", 0.1)), pool("decode", gang("d", 0.2), gang("e", 9.9)))
    assert (report.is_healthy, report.reason) == (True, "")


def test_a_gang_whose_link_is_slow_serves_and_says_so() -> None:
    slow = {**gang("d", 0.1), "link": {"slow": "the link between its ranks carries 1.2 MB/s"}}
    report = report_of(pool("both", slow, {**gang("e", 0.1), "link": {"slow": None}}, gang("f", 0.1)))
    assert report.is_healthy
    assert report.reason == "gang d: the link between its ranks carries 1.2 MB/s"


def test_a_pool_that_serves_with_fewer_gangs_says_what_the_others_lack() -> None:
    waiting = {**gang("c", None, state="failed"), "reason": "no room for c"}
    report = report_of(pool("both", gang("b", 0.1), waiting))
    assert (report.is_healthy, report.reason) == (True, "pool both: 1 of 2 gangs: no room for c")
