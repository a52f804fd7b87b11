"""`PoolHistory`: what has happened in a pool, for health pages and metrics."""

from __future__ import annotations

import collections
import logging
import time
from typing import Any, Final, Literal

logger = logging.getLogger(__name__)

EventKind = Literal["ready", "fault", "not placed", "scaled", "moved", "update"]
UpdateState = Literal["running", "done", "stopped"]

_NUM_EVENTS: Final = 20


class PoolHistory:
    """`trouble` is the last problem, whether or not it is over."""

    def __init__(self, pool: str) -> None:
        self.has_served = False
        self.trouble: str | None = None
        self.num_faults = 0
        self._pool = pool
        self._update: tuple[UpdateState, str] | None = None
        self._num_changes: collections.Counter[str] = collections.Counter({"scaled": 0, "moved": 0, "update": 0})
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_NUM_EVENTS)

    def keep_event(self, kind: EventKind, text: str, gang_id: str = "") -> None:
        if kind in self._num_changes:
            self._num_changes[kind] += 1
        self._events.append({"time_s": time.time(), "gang_id": gang_id, "kind": kind, "text": text})

    def note_update(self, state: UpdateState, text: str) -> None:
        self._update = state, text
        self.keep_event("update", f"{state}: {text}")
        log = logger.warning if state == "stopped" else logger.info
        log("update of pool %s %s: %s", self._pool, state, text)

    def describe(self) -> dict[str, Any]:
        return {
            "trouble": self.trouble,
            "num_faults": self.num_faults,
            "num_changes": dict(self._num_changes),
            "update": None if self._update is None else {"state": self._update[0], "text": self._update[1]},
            "events": list(self._events),
        }
