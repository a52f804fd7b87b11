"""`LimitedLog`: for log lines that strangers can cause at will: one per minute, with the number of those left out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 60.0


class LimitedLog:
    """Writes at most one line per `INTERVAL_S`. May be used on any thread."""

    def __init__(self, logger: logging.Logger, level: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._level = level
        self._clock = clock
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._num_left_out = 0

    def write(self, message: str) -> None:
        now_s = self._clock()
        with self._lock:
            if now_s < self._next_s:
                self._num_left_out += 1
                return
            num_left_out, self._num_left_out = self._num_left_out, 0
            self._next_s = now_s + INTERVAL_S
        more = f" ({num_left_out} more since the last such line)" if num_left_out else ""
        self._logger.log(self._level, "%s%s", message, more)
