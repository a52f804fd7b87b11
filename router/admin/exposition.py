"""The admin port's `/metrics`: the metrics of all routers, with a label for each, of all gangs and of the pools.

One target for Prometheus, also where several routers share a port behind Serve's proxy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorweave.router.admin.observer import Seen
from tensorweave.router.http.metrics import GangMetrics

_STATES: Final = ("starting", "ready", "restarting", "draining", "stopped", "failed")


def render(seen: Seen, model_name: str) -> bytes:
    model = {"model_name": model_name}
    gangs = GangMetrics(model)
    gangs.gauges = seen.now.gauges
    registry = CollectorRegistry()
    for collector in (_Routers(seen), gangs, _Pools(seen, model_name)):
        registry.register(collector)
    return generate_latest(registry)


class _Routers(Collector):
    def __init__(self, seen: Seen) -> None:
        self._reports = seen.reports

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for router, (_, report) in self._reports.items():
            for rows in report.metrics:
                family = families.setdefault(rows.name, Metric(rows.name, rows.text, rows.kind))
                for name, labels, value in rows.rows:
                    family.add_sample(name, {**dict(labels), "router": router}, value)
        yield from families.values()


class _Pools(Collector):
    def __init__(self, seen: Seen, model_name: str) -> None:
        self._seen = seen
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        yield self._family(
            GaugeMetricFamily,
            "pools_known",
            "1 if the supervisor of the pools answers.",
            [([], float(self._seen.trouble is None))],
        )
        yield from self._of_pools(self._seen.pools)
        yield from self._of_gangs(self._seen.pools)

    def _of_pools(self, pools: Sequence[dict[str, Any]]) -> Iterator[Metric]:
        yield self._family(
            GaugeMetricFamily,
            "pool_gangs",
            "Gangs of a pool, by state.",
            [([pool["pool"], pool["role"], state], _count(pool, state)) for pool in pools for state in _STATES],
            *("pool", "role", "state"),
        )
        yield self._family(
            GaugeMetricFamily,
            "pool_gangs_wanted",
            "Gangs that a pool should have.",
            [([pool["pool"], pool["role"]], pool["replicas"]) for pool in pools],
            *("pool", "role"),
        )
        yield self._family(
            CounterMetricFamily,
            "pool_gang_faults",
            "Gangs of a pool that ended or did not start.",
            [([pool["pool"], pool["role"]], pool.get("num_faults", 0)) for pool in pools],
            *("pool", "role"),
        )
        yield self._family(
            CounterMetricFamily,
            "pool_changes",
            "Changes of a pool: its size (scaled), gangs that came or left (moved), steps of an update.",
            [([pool["pool"], kind], count) for pool in pools for kind, count in pool.get("num_changes", {}).items()],
            *("pool", "kind"),
        )
        yield self._family(
            GaugeMetricFamily,
            "pool_pressure",
            "The largest of what is measured at a pool, divided by its target.",
            [([pool["pool"]], pool["pressure"]) for pool in pools if pool.get("pressure") is not None],
            "pool",
        )

    def _of_gangs(self, pools: Sequence[dict[str, Any]]) -> Iterator[Metric]:
        yield self._family(
            GaugeMetricFamily,
            "gang_progress_age_seconds",
            "Time since the step loop of the gang's slowest rank made progress.",
            [([pool["pool"], gang["gang_id"]], age_s) for pool, gang, age_s in _progress(pools)],
            *("pool", "gang"),
        )
        yield self._family(
            GaugeMetricFamily,
            "kv_link_bytes_per_second",
            "Rate of the link from a prefill to a decode gang, measured once; 0 if nothing passes.",
            [([source, gang_id], link["megabytes_per_s"] * 1e6) for source, gang_id, link in _links(pools)],
            *("source", "gang"),
        )

    def _family(
        self, kind: type[Any], name: str, text: str, values: list[tuple[list[str], float]], *labels: str
    ) -> Metric:
        family: Metric = kind(f"tensorweave_{name}", text, labels=["model_name", *labels])
        for own, value in values:
            family.add_metric([self._model_name, *own], value)  # type: ignore[attr-defined]
        return family


def _count(pool: dict[str, Any], state: str) -> int:
    return sum(gang["state"] == state for gang in pool["gangs"])


def _progress(pools: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    for pool in pools:
        for gang in pool["gangs"]:
            ages_s = [rank["progress_age_s"] for rank in gang.get("ranks", ()) if rank["progress_age_s"] is not None]
            if ages_s:
                yield pool, gang, max(ages_s)


def _links(pools: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for pool in pools:
        for gang in pool["gangs"]:
            for source, link in gang.get("kv_links", {}).items():
                yield source, gang["gang_id"], link
