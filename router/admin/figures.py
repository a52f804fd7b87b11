"""What the metrics of routers and gangs amount to over a time: rates of counters, percentiles of histograms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.cluster.router_report import RouterReport

PREFIX: Final = "tensorweave_"
Buckets = Mapping[float, float]
"""A histogram: by upper bound, the number of observations up to it."""


@dataclass(frozen=True, slots=True)
class RouterFigures:
    """A report in short. `totals`: by name, without the prefix, the sum over all labels. `buckets`: by histogram."""

    clock_s: float
    totals: Mapping[str, float]
    buckets: Mapping[str, Buckets]

    @classmethod
    def of(cls, report: RouterReport) -> RouterFigures:
        totals: dict[str, float] = {}
        buckets: dict[str, dict[float, float]] = {}
        for family in report.metrics:
            for full_name, labels, value in family.rows:
                name = full_name.removeprefix(PREFIX)
                if name.endswith("_bucket"):
                    own = buckets.setdefault(name.removesuffix("_bucket"), {})
                    bound = float(dict(labels)["le"])
                    own[bound] = own.get(bound, 0.0) + value
                elif not name.endswith("_created"):
                    totals[name] = totals.get(name, 0.0) + value
        return cls(report.clock_s, totals, buckets)


def total(routers: Mapping[str, RouterFigures], name: str) -> float:
    return sum(figures.totals.get(name, 0.0) for figures in routers.values())


def rate(before: Mapping[str, RouterFigures], now: Mapping[str, RouterFigures], name: str) -> float | None:
    """The rate of a counter, per second, over all routers that are in both; None if none is, or none has reported
    since."""
    rates = [
        max(0.0, new.totals.get(name, 0.0) - old.totals.get(name, 0.0)) / (new.clock_s - old.clock_s)
        for old, new in _pairs(before, now)
    ]
    return sum(rates) if rates else None


def observed(before: Mapping[str, RouterFigures], now: Mapping[str, RouterFigures], name: str) -> Buckets:
    """A histogram of what was observed in between, over all routers that are in both."""
    result: dict[float, float] = {}
    for old, new in _pairs(before, now):
        earlier = old.buckets.get(name, {})
        for bound, count in new.buckets.get(name, {}).items():
            result[bound] = result.get(bound, 0.0) + max(0.0, count - earlier.get(bound, 0.0))
    return result


def _pairs(
    before: Mapping[str, RouterFigures], now: Mapping[str, RouterFigures]
) -> Iterator[tuple[RouterFigures, RouterFigures]]:
    for name, new in now.items():
        if (old := before.get(name)) is not None and new.clock_s > old.clock_s:
            yield old, new


def percentile(buckets: Buckets, share: float) -> float | None:
    """As Prometheus' `histogram_quantile`: linear within a bucket, and beyond the last bound that bound. None if
    nothing was observed."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    wanted = share * buckets[bounds[-1]]
    for lower, upper in itertools.pairwise([0.0, *bounds]):
        if buckets[upper] >= wanted:
            if math.isinf(upper):
                return lower
            below = buckets.get(lower, 0.0)
            inside = buckets[upper] - below
            return lower + (upper - lower) * ((wanted - below) / inside if inside else 1.0)
    return bounds[-1]


def percentiles(buckets: Buckets, shares: Sequence[float]) -> list[float | None]:
    return [percentile(buckets, share) for share in shares]
