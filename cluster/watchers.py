"""`Watchers`: which version of the service's state each front end has, so that a change can wait until all have it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

FORGET_S: Final = 25.0
"""Front ends ask again every 10 s at the latest."""


class Watchers:
    """Plain asyncio."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}
        self._changed = asyncio.Event()

    def note(self, watcher: str, version: int) -> None:
        """It has this version; one without a name is not waited for."""
        if watcher:
            self._seen[watcher] = version, self._clock()
            self._changed.set()
            self._changed = asyncio.Event()

    async def until_at(self, version: int, timeout_s: float) -> bool:
        """Wait until all that were heard of lately have this version or a later one. Return whether they do."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._behind(version):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _behind(self, version: int) -> bool:
        now_s = self._clock()
        self._seen = {name: each for name, each in self._seen.items() if now_s - each[1] < FORGET_S}
        return any(seen < version for seen, _ in self._seen.values())
