"""`IterationResult`: rows that an engine has gathered, for `async for`."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Any, Self


class IterationResult:
    """The rows since the last call, oldest first. The iteration ends when there are no more.

    Rows are fetched in a thread: when the iteration begins, and again when all are used up. A pickled or copied result
    has the rows that had been fetched until then, and ends with them.
    """

    def __init__(self, fetch: Callable[[], list[dict[str, Any]]]) -> None:
        self._fetch = fetch
        self._rows: collections.deque[dict[str, Any]] = collections.deque()

    def __getstate__(self) -> list[dict[str, Any]]:
        return list(self._rows)

    def __setstate__(self, rows: list[dict[str, Any]]) -> None:
        self._fetch, self._rows = list, collections.deque(rows)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if not self._rows:
            self._rows.extend(await asyncio.to_thread(self._fetch))
        if not self._rows:
            raise StopAsyncIteration
        return self._rows.popleft()
