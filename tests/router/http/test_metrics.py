"""Gangs in `/metrics`: the leader's gauges, and KV transfer counts summed over all ranks."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.metrics import RouterMetrics
from tests.router.fake_fleet import FakeFleet


class DescribedFleet(FakeFleet):
    pools: list[dict[str, Any]]

    async def describe(self) -> list[dict[str, Any]]:
        return self.pools


def gang(gang_id: str, *gauges: dict[str, float]) -> dict[str, Any]:
    return {"gang_id": gang_id, "state": "ready", "ranks": [{"progress_age_s": 0.0, "gauges": own} for own in gauges]}


def show(metrics: RouterMetrics, fleet: DescribedFleet, *gangs: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """By kind, name and gang."""
    fleet.pools = [{"pool": "main", "role": "both", "gangs": gangs, "failure": None, "trouble": None}]
    text = asyncio.run(metrics.render(fleet)).decode()
    return {
        (family.type, sample.name.removeprefix("tensorweave_"), sample.labels["gang"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "gang" in sample.labels
    }


def test_gangs_are_shown_as_they_are_and_gone_when_they_are_gone() -> None:
    fleet = DescribedFleet()
    metrics = RouterMetrics("m", Dispatcher(fleet))
    leader = {
        "num_requests_running": 3.0,
        "num_preemptions_total": 2.0,
        "requests_not_finite_total": 7.0,
        "kv_transfer_failures_digest_total": 0.0,
        "kv_transfer_bytes_total": 10.0,
        "kv_transfer_fetches_total": 4.0,
        "kv_transfer_open_fetches": 1.0,
    }
    other = {**leader, "kv_transfer_failures_digest_total": 5.0}
    shown = show(metrics, fleet, gang("d-0", leader, other), gang("starting"))
    assert shown == {
        ("gauge", "gang_num_requests_running", "d-0"): 3.0,
        ("counter", "gang_preemptions_total", "d-0"): 2.0,
        ("counter", "gang_requests_not_finite_total", "d-0"): 7.0,
        ("counter", "kv_transfer_failures_digest_total", "d-0"): 5.0,
        ("counter", "kv_transfer_bytes_total", "d-0"): 20.0,
        ("counter", "kv_transfer_fetches_total", "d-0"): 4.0,
        ("gauge", "kv_transfer_open_fetches", "d-0"): 1.0,
    }
    shown = show(metrics, fleet, gang("d-1", {"num_requests_running": 1.0}))
    assert shown == {("gauge", "gang_num_requests_running", "d-1"): 1.0}
