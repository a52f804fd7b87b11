"""An event loop on a stepped clock: when nothing is ready, the clock goes to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _SteppedSelector(selectors.DefaultSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and no timer will end it")
        if timeout > 0:
            self.now_s += timeout
        return []


class SteppedLoop(asyncio.SelectorEventLoop):
    """For what needs no socket, thread or signal."""

    def __init__(self) -> None:
        self._stepped = _SteppedSelector()
        super().__init__(self._stepped)

    def time(self) -> float:
        return self._stepped.now_s


def run_stepped(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SteppedLoop) as runner:
        return runner.run(main)
