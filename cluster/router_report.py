"""`RouterReport`: the metrics of one router replica, as it sends them to the process with the admin port."""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[str, tuple[tuple[str, str], ...], float]
"""The name of a sample, its labels and its value."""


@dataclass(frozen=True, slots=True)
class MetricRows:
    """One metric family, in Prometheus' terms."""

    name: str
    kind: str
    text: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RouterReport:
    """`router` is the replica's name, `clock_s` its monotonic clock when the metrics were read."""

    router: str
    clock_s: float
    metrics: tuple[MetricRows, ...]
