"""`LatestAnswer`: what another process was last known to say, for those who may not wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.pending_replies import copy_error

T = TypeVar("T")

_PATIENCE_S: Final = 0.02
_MAX_AGE_S: Final = 10.0


class LatestAnswer(Generic[T]):
    """Asks again whenever it is asked, once at a time. Used on one event loop.

    Args:
        ask: Returns a new answer, or raises NotReady. It has a deadline of its own.
        patience_s: How long to wait for a new answer while there is an older one.
        max_age_s: An older answer than that is no answer.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[T]],
        patience_s: float = _PATIENCE_S,
        max_age_s: float = _MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._patience_s = patience_s
        self._max_age_s = max_age_s
        self._clock = clock
        self._asking: asyncio.Task[T | NotReady] | None = None
        self._known: tuple[float, T] | None = None

    async def get(self) -> T:
        """Raises NotReady if the newest answer is that, or if there is none."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_once(), name="latest-answer")
        asking, known = self._asking, self._known
        is_usable = known is not None and self._clock() - known[0] <= self._max_age_s
        await asyncio.wait({asking}, timeout=self._patience_s if is_usable else None)
        if not asking.done():
            assert known is not None
            return known[1]
        if isinstance(answer := asking.result(), NotReady):
            raise copy_error(answer)
        return answer

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    async def _ask_once(self) -> T | NotReady:
        try:
            answer = await self._ask()
        except NotReady as error:
            return error
        self._known = self._clock(), answer
        return answer
