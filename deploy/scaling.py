"""`decide`: from the loads of the pools to the next change of them, if there should be one. Pure functions.

    pressure ≥ 1 for `hold_s`     ──▶ a gang moves here from a pool that can spare one (`moves`), else the pool grows
    a gang less would do, for `shrink_hold_s` ──▶ the pool shrinks

Hysteresis: a pool gives a gang away only if its pressure with one gang less stays below `slack`, which is below 1; and
after each change nothing changes for `pause_s`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from tensorweave.deploy.config_scaling import ScalingConfig

_MOST_GROWTH: Final = 2.0
_COUNTERPART: Final = {"prefill": "decode", "decode": "prefill"}


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """A pool at one moment.

    Attributes:
        num_gangs: Gangs that are ready.
        is_settled: Whether these are all that are wanted, and none is draining.
        pressure: The largest ratio of what is measured to its target; 0 without traffic.
        reason: What was measured, for the log.
        min_gangs, max_gangs: Bounds that the configuration gives; None: it gives none, and the pool keeps its size.
    """

    name: str
    role: str
    num_gangs: int
    pressure: float
    reason: str = ""
    is_settled: bool = True
    min_gangs: int | None = None
    max_gangs: int | None = None

    @property
    def pressure_with_less(self) -> float:
        """The pressure that the pool would have with one gang less."""
        return self.pressure * self.num_gangs / (self.num_gangs - 1) if self.num_gangs > 1 else math.inf

    def describe(self) -> str:
        return f"{self.name} has pressure {self.pressure:.2f}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Scale:
    pool: str
    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    source: str
    target: str
    reason: str


Change = Scale | Move
Trend = Literal["high", "low"]


@dataclass(frozen=True, slots=True)
class Trends:
    """Since when pools have been above their targets, or could do with a gang less; and when the last change was."""

    since_s: Mapping[tuple[str, Trend], float] = field(default_factory=dict)
    changed_s: float = -math.inf

    def lasted_s(self, pool: PoolLoad, trend: Trend, now_s: float) -> float:
        """-1 if it is not so."""
        since_s = self.since_s.get((pool.name, trend))
        return -1.0 if since_s is None else now_s - since_s


def decide(
    settings: ScalingConfig, loads: Sequence[PoolLoad], now_s: float, trends: Trends
) -> tuple[Trends, Change | None]:
    """The trends including these loads, and at most one change, with its reason."""
    trends = Trends(_since(settings, loads, now_s, trends), trends.changed_s)
    if now_s - trends.changed_s < settings.pause_s or not all(load.is_settled for load in loads):
        return trends, None
    change = _relieve(settings, loads, now_s, trends) or _shrink(settings, loads, now_s, trends)
    return (trends, None) if change is None else (Trends({}, now_s), change)


def _since(
    settings: ScalingConfig, loads: Sequence[PoolLoad], now_s: float, trends: Trends
) -> dict[tuple[str, Trend], float]:
    now: list[tuple[str, Trend]] = []
    for load in loads:
        if load.pressure >= 1:
            now.append((load.name, "high"))
        if load.pressure_with_less <= settings.slack:
            now.append((load.name, "low"))
    return {key: trends.since_s.get(key, now_s) for key in now}


def _relieve(settings: ScalingConfig, loads: Sequence[PoolLoad], now_s: float, trends: Trends) -> Change | None:
    for load in sorted(loads, key=lambda load: -load.pressure):
        lasted_s = trends.lasted_s(load, "high", now_s)
        if lasted_s < settings.hold_s or lasted_s < 0:
            continue
        why = f"{load.describe()} for {lasted_s:.0f} s"
        giver = _giver(settings, load, loads, now_s, trends)
        if giver is not None:
            spare = (
                f"{giver.describe()}, and would have {giver.pressure_with_less:.2f} with {giver.num_gangs - 1} gangs"
            )
            return Move(giver.name, load.name, f"{why}; {spare}")
        if load.max_gangs is not None and load.num_gangs < load.max_gangs:
            wanted = math.ceil(load.num_gangs * min(load.pressure, _MOST_GROWTH))
            return Scale(load.name, min(load.max_gangs, max(load.num_gangs + 1, wanted)), why)
    return None


def _giver(
    settings: ScalingConfig, load: PoolLoad, loads: Sequence[PoolLoad], now_s: float, trends: Trends
) -> PoolLoad | None:
    """The pool that can best spare a gang for this one."""
    if not settings.moves or (load.max_gangs is not None and load.num_gangs >= load.max_gangs):
        return None
    givers = [
        other
        for other in loads
        if other.role == _COUNTERPART.get(load.role)
        and other.num_gangs > (other.min_gangs or 1)
        and trends.lasted_s(other, "low", now_s) >= settings.hold_s
    ]
    return min(givers, key=lambda other: other.pressure_with_less, default=None)


def _shrink(settings: ScalingConfig, loads: Sequence[PoolLoad], now_s: float, trends: Trends) -> Change | None:
    for load in loads:
        lasted_s = trends.lasted_s(load, "low", now_s)
        if load.min_gangs is not None and load.num_gangs > load.min_gangs and lasted_s >= settings.shrink_hold_s:
            return Scale(load.name, load.num_gangs - 1, f"{load.describe()}: a gang less has done for {lasted_s:.0f} s")
    return None
