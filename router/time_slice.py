"""`TimeSlice`: long work in the event loop, a few milliseconds at a time."""

from __future__ import annotations

import asyncio
import time
from typing import Final

_SLICE_S: Final = 0.005


class TimeSlice:
    """For one request's work: call `checkpoint` between its parts."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._used_s = 0.0

    def resume(self) -> None:
        """The time since the last checkpoint was a wait and does not count."""
        self._started_s = time.perf_counter() - self._used_s

    async def checkpoint(self) -> None:
        """Let other tasks run if the slice is used up."""
        self._used_s = time.perf_counter() - self._started_s
        if self._used_s > _SLICE_S:
            await asyncio.sleep(0)
            self._started_s, self._used_s = time.perf_counter(), 0.0
