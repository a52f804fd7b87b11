"""The process of a rank as the system sees it: when it must end.

No torch here: the supervisor imports `workers.rank`, which uses this.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

_GUARD_INTERVAL_S: Final = 1.0
_REPORT_TIME_S: Final = 3.0
"""How long a rank whose step loop has failed goes on: its heartbeat says why, and its leader tells its clients."""
_BLOCKED_S: Final = 10.0
"""How long the interpreter may run no other thread before all stacks are written: a rank that does not answer for a few
times as long is killed, and nobody could tell what it did."""
_STDERR: Final = 2
_PR_SET_PDEATHSIG: Final = 1


class ProcessGuard:
    """Ends this process when its parent is gone, nobody supervises it any more, or its step loop has failed, whatever
    its other threads do. If one of them keeps the interpreter locked, the stacks of all go to the error output.

    Args:
        has_failed: whether the step loop has failed.
        on_unsupervised: called before the process ends because nobody supervises it.
        blocked_s: how long the interpreter is locked until the stacks are written.
    """

    def __init__(
        self, has_failed: Callable[[], bool], on_unsupervised: Callable[[], None], blocked_s: float = _BLOCKED_S
    ) -> None:
        self._has_failed = has_failed
        self._on_unsupervised = on_unsupervised
        self._blocked_s = blocked_s
        self._parent = os.getppid()
        self._num_silent = 0
        self._stopping = threading.Event()

    def start(self, lease_s: float | None) -> None:
        """`lease_s` is how long the process goes on without a heartbeat; None: for ever. It is counted in rounds of the
        guard, not by the clock: the host may have been suspended."""
        self._expect_round()
        threading.Thread(target=self._run, args=(lease_s,), name="rank-guard", daemon=True).start()

    def note_heartbeat(self) -> None:
        self._num_silent = 0

    def stop(self) -> None:
        """The process ends in order now."""
        self._stopping.set()

    def _run(self, lease_s: float | None) -> None:
        while not self._stopping.wait(_GUARD_INTERVAL_S):
            self._expect_round()
            if os.getppid() != self._parent:
                os._exit(1)
            self._num_silent += 1
            if lease_s is not None and self._num_silent * _GUARD_INTERVAL_S > lease_s:
                logger.error("no supervisor has asked for %g s: this rank ends", lease_s)
                self._on_unsupervised()
                os._exit(1)
            if self._has_failed():
                self._stopping.wait(_REPORT_TIME_S)
                os._exit(1)
        faulthandler.cancel_dump_traceback_later()

    def _expect_round(self) -> None:
        """Until the guard comes round again, a thread that needs no interpreter writes the stacks each time that
        `blocked_s` have passed: the first may come of a pause of the host, before anything is locked."""
        faulthandler.dump_traceback_later(self._blocked_s, repeat=True, file=_STDERR)


def die_with_parent() -> None:
    """On Linux the kernel kills this process with its parent, even while it is stopped; elsewhere `ProcessGuard` ends
    it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
