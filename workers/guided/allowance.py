"""`Allowance`: a share of a core, which may be saved up."""

from __future__ import annotations

import time
from collections.abc import Callable


class Allowance:
    """Grows by `share` of each second to at most `most_s`, with which it begins. For one thread."""

    def __init__(self, share: float, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._most_s = self._left_s = most_s
        self._clock = clock
        self._told_s = clock()

    def take(self, seconds: float) -> bool:
        """Take all of it, or nothing."""
        now_s = self._clock()
        self._left_s = min(self._most_s, self._left_s + self._share * (now_s - self._told_s))
        self._told_s = now_s
        if self._left_s < seconds:
            return False
        self._left_s -= seconds
        return True
