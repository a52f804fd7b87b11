"""An event loop whose clock jumps to the next timer when nothing is ready: back-offs and deadlines cost no time. For
tests, and for simulations (`tensorweave replay --simulate`)."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits, and no timer will end it")
        if not ready and timeout is not None:
            self.now_s += max(timeout, 0.0)
        return ready


class SteppedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run_stepped(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SteppedLoop) as runner:
        return runner.run(main)
