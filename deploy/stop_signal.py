"""`StopSignal`: wait for SIGTERM, SIGINT or SIGHUP. The handler writes to a pipe, on which the main thread waits."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any, Final, Self

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """A context manager for the main thread. The first signal asks to stop; a second one has its former effect."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self.arm()
        return self

    def arm(self) -> None:
        """Install the handlers. Call it again after `ray.init`, which installs its own."""
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
        """Whether a signal came within `timeout_s`, or earlier."""
        return bool(select.select([self._reader], [], [], timeout_s)[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        os.write(self._writer, b"!")
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
