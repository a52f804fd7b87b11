"""`EventPace`: how many deltas of answers a router makes in a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

_LEAST_WAIT_S: Final = 0.01
"""A shorter wait joins no two steps of a large batch, and costs a timer."""


class EventPace:
    """Told of each delta, and says how long its sequence waits before it asks for the next.

    A delta costs a router and a client's process about 0.1 ms whatever it holds, so that 256 sequences of 10 ms a step
    are more than either can follow, and the answers fall behind further and further. Tokens that come while a sequence
    waits are handed over as one (`ChunkInbox`). Sequences wait only while the deltas of all together exceed the rate,
    and the first tokens of an answer never do.

    Args:
        most_per_s: deltas of all sequences; infinite: none ever waits.
    """

    def __init__(self, most_per_s: float = math.inf, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._each_s = 1 / most_per_s
        self._now_s = now_s
        self._free_s = 0.0

    def wait_s(self) -> float:
        """Seconds to wait after a delta that has just been made; 0: not at all."""
        now_s = self._now_s()
        self._free_s = max(self._free_s, now_s) + self._each_s
        wait_s = self._free_s - now_s
        return wait_s if wait_s >= _LEAST_WAIT_S else 0.0
