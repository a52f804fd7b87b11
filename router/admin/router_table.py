"""`RouterTable`: the latest report of each router replica."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from tensorweave.cluster.router_report import RouterReport

WATCHED_INTERVAL_S: Final = 1.0
IDLE_INTERVAL_S: Final = 5.0
_WATCHED_S: Final = 60.0
_KEPT_S: Final = 30.0


class RouterTable:
    """Used on several threads. Routers report more often while the admin port is in use."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._reports: dict[str, tuple[float, RouterReport]] = {}
        self._watched_until_s = 0.0

    def note(self, report: RouterReport) -> float:
        """Return when this router is to report again, in seconds from now."""
        now_s = self._clock()
        with self._lock:
            self._reports[report.router] = (now_s, report)
            return WATCHED_INTERVAL_S if now_s < self._watched_until_s else IDLE_INTERVAL_S

    def note_watched(self) -> None:
        with self._lock:
            self._watched_until_s = self._clock() + _WATCHED_S

    def latest(self) -> Mapping[str, tuple[float, RouterReport]]:
        """The age in seconds of each router's report, and the report, by router. A router that is silent is left
        out."""
        now_s = self._clock()
        with self._lock:
            self._reports = {
                name: (noted_s, report)
                for name, (noted_s, report) in self._reports.items()
                if now_s - noted_s < _KEPT_S
            }
            return {name: (now_s - noted_s, report) for name, (noted_s, report) in sorted(self._reports.items())}
