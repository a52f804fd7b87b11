"""`FaultRecord`: how often the gangs of one slot have failed recently, and how long to wait before the next one."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Final

_FIRST_PAUSE_S: Final = 1.0
_MAX_PAUSE_S: Final = 30.0
_FIRST_LONG_PAUSE_S: Final = 30.0
_MAX_LONG_PAUSE_S: Final = 600.0


class FaultRecord:
    """No pause after a first failure, then 1, 2, 4 … 30 s. After `max_faults` faults within `window_s`, 30, 60 … 600 s,
    until a gang has served for `window_s` without a fault."""

    def __init__(self, max_faults: int, window_s: float, clock: Callable[[], float]) -> None:
        self._max_faults = max_faults
        self._window_s = window_s
        self._clock = clock
        self._faults_s: collections.deque[float] = collections.deque()
        self._num_running = 0
        self._num_long_pauses = 0
        self._ready_s: float | None = None

    @property
    def is_exhausted(self) -> bool:
        return self._num_long_pauses > 0

    @property
    def summary(self) -> str:
        return f"{len(self._faults_s)} faults within {self._window_s:g} s"

    @property
    def pause_s(self) -> float:
        if self._num_long_pauses:
            return _grow(_FIRST_LONG_PAUSE_S, self._num_long_pauses - 1, _MAX_LONG_PAUSE_S)
        return 0.0 if self._num_running <= 1 else _grow(_FIRST_PAUSE_S, self._num_running - 2, _MAX_PAUSE_S)

    def note_ready(self) -> None:
        self._ready_s = self._clock()
        self._num_running = 0

    def note_unplaced(self) -> None:
        """A gang could not be placed, which is not a fault of its own."""
        self._num_running += 1

    def note_fault(self) -> None:
        now_s = self._clock()
        if self._ready_s is not None and now_s - self._ready_s >= self._window_s:
            self._num_long_pauses = 0
        self._ready_s = None
        self._num_running += 1
        self._faults_s.append(now_s)
        while self._faults_s[0] < now_s - self._window_s:
            self._faults_s.popleft()
        if self._num_long_pauses or len(self._faults_s) >= self._max_faults:
            self._num_long_pauses += 1


def _grow(first_s: float, num_doublings: int, most_s: float) -> float:
    return float(min(most_s, first_s * 2.0 ** min(num_doublings, 32)))
