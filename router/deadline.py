"""`Deadline`: `asyncio.timeout_at` for the many short waits of a stream, with one timer for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

_T = TypeVar("_T")


class Deadline:
    """Bounds waits, one at a time: `wait` raises TimeoutError at `at_s`, on the event loop's clock. Between waits it
    does nothing, so it may be held over the `yield` of a generator.

    `asyncio.timeout_at` costs 4 µs for each wait, a tenth of what a router does for a token.
    """

    def __init__(self, at_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._at_s = at_s
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._has_cancelled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def move(self, at_s: float) -> None:
        """Make it later."""
        self._at_s = at_s

    async def wait(self, begin: Callable[[], Awaitable[_T]]) -> _T:
        """Await what `begin` returns. Raises TimeoutError; if the deadline has passed already, before `begin`."""
        if self._loop.time() >= self._at_s:
            raise TimeoutError
        self._waiting = task = asyncio.current_task()
        assert task is not None
        if self._timer is None:
            self._timer = self._loop.call_at(self._at_s, self._check)
        num_cancels, is_cancelled = task.cancelling(), False
        try:
            return await begin()
        except asyncio.CancelledError:
            is_cancelled = True
            raise
        finally:
            self._waiting = None
            if self._has_cancelled:
                self._has_cancelled = False
                if task.uncancel() <= num_cancels and is_cancelled:
                    raise TimeoutError from None

    def _check(self) -> None:
        """The timer is due, but perhaps nobody waits, or the deadline has been moved."""
        self._timer = None
        if self._waiting is None:
            return
        if self._loop.time() < self._at_s:
            self._timer = self._loop.call_at(self._at_s, self._check)
        else:
            self._has_cancelled = True
            self._waiting.cancel()
