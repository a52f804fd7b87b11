"""`Observer`: looks at the pools and the routers when somebody asks, and keeps what it saw for a while.

Rates and latencies are the differences between two looks, so they are known from the second one on.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.router_report import RouterReport
from tensorweave.router.admin.figures import RouterFigures
from tensorweave.router.admin.router_table import RouterTable
from tensorweave.router.admin.status import Point
from tensorweave.router.admin.traffic import traffic_between
from tensorweave.router.http.health import gang_gauges

WINDOW_S: Final = 30.0
"""Rates cover at least this time, if there was a look so long ago."""
_MAX_WINDOW_S: Final = 120.0
_FRESH_S: Final = 0.5
_POINT_INTERVAL_S: Final = 2.0
"""More than the time between two reports of a router."""
_NUM_POINTS: Final = 150

Pools = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Look:
    """The figures of one moment. `clock_s` is monotonic."""

    clock_s: float
    time_s: float
    gauges: Mapping[str, Mapping[str, float]]
    routers: Mapping[str, RouterFigures]


@dataclass(frozen=True, slots=True)
class Seen:
    """The latest look with its details, and those before it, oldest first. `trouble`: why the pools are unknown."""

    pools: Pools
    trouble: str | None
    reports: Mapping[str, tuple[float, RouterReport]]
    looks: Sequence[Look]
    points: Sequence[Point]

    @property
    def now(self) -> Look:
        return self.looks[-1]

    @property
    def has_ready_gang(self) -> bool:
        return any(gang["state"] == "ready" for pool in self.pools for gang in pool["gangs"])

    @property
    def before(self) -> Look | None:
        """The other end of the window: the latest look that is old enough, else the oldest; None if there is none."""
        ages_s = [(self.now.clock_s - look.clock_s, look) for look in self.looks[:-1]]
        whole = [look for age_s, look in ages_s if age_s >= WINDOW_S]
        return whole[-1] if whole else ages_s[0][1] if ages_s else None


class Observer:
    """Lives on one event loop. `describe` returns the pools, or raises NotReady."""

    def __init__(
        self,
        describe: Callable[[], Awaitable[Pools]],
        routers: RouterTable,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._describe = describe
        self._routers = routers
        self._clock = clock
        self._wall_clock = wall_clock
        self._looks: collections.deque[Look] = collections.deque()
        self._last_point: Look | None = None
        self._points: collections.deque[Point] = collections.deque(maxlen=_NUM_POINTS)
        self._seen: Seen | None = None
        self._looking = asyncio.Lock()

    async def look(self) -> Seen:
        """What there is now, or was half a second ago."""
        self._routers.note_watched()
        async with self._looking:
            if self._seen is None or self._clock() - self._seen.now.clock_s >= _FRESH_S:
                self._seen = await self._look()
        return self._seen

    async def _look(self) -> Seen:
        trouble: str | None = None
        pools: Pools = []
        try:
            pools = await self._describe()
        except NotReady as error:
            trouble = error.message
        reports = self._routers.latest()
        figures = {name: RouterFigures.of(report) for name, (_, report) in reports.items()}
        now = Look(self._clock(), self._wall_clock(), gang_gauges(pools), figures)
        self._looks.append(now)
        while self._looks[0].clock_s < now.clock_s - _MAX_WINDOW_S:
            self._looks.popleft()
        self._add_point(now)
        return Seen(pools, trouble, reports, list(self._looks), list(self._points))

    def _add_point(self, now: Look) -> None:
        before = self._last_point
        if before is None:
            self._last_point = now
        elif now.clock_s - before.clock_s >= _POINT_INTERVAL_S:
            traffic = traffic_between(before.routers, now.routers)
            self._points.append(
                Point(
                    time_s=now.time_s,
                    num_running=traffic.num_running,
                    num_waiting=traffic.num_waiting,
                    output_tokens_per_s=traffic.output_tokens_per_s,
                    ttft_p50_s=traffic.time_to_first_token.p50_s,
                    itl_p50_s=traffic.inter_token_latency.p50_s,
                )
            )
            self._last_point = now
