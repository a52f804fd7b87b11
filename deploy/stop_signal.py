"""Waiting for SIGTERM, SIGINT or SIGHUP without a poll: the handler writes to a pipe, the main thread waits on it."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any, Final, Self

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """A context manager of the main thread. The first signal asks to stop; one more of them acts as it did before."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self.arm()
        return self

    def arm(self) -> None:
        """Take the signals, again if need be: `ray.init` puts handlers of its own in their place."""
        for number in _SIGNALS:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once a signal came; False when `timeout_s` passed without one."""
        return bool(select.select([self._reader], [], [], timeout_s)[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        os.write(self._writer, b"!")
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
