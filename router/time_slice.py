"""`TimeSlice`: long work in the event loop, done a few milliseconds at a time."""

from __future__ import annotations

import asyncio
import time
from typing import Final

_SLICE_S: Final = 0.005


class TimeSlice:
    """Of one request's work. Between its parts, `checkpoint` lets others run once a slice of time has passed."""

    def __init__(self) -> None:
        self._since_s = time.perf_counter()

    async def checkpoint(self) -> None:
        if time.perf_counter() - self._since_s > _SLICE_S:
            await asyncio.sleep(0)
            self._since_s = time.perf_counter()
