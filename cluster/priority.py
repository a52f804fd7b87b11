"""`lower_priority`: of a process of ours that must leave the cores to the step loops."""

from __future__ import annotations

import contextlib
import os
from typing import Final

NICENESS: Final = 10
"""Beside the caller's: a tenth of a core that a step loop wants as well."""
_LAST: Final = 19


def lower_priority() -> None:
    """Of this process, which has one thread, and of what it starts.

    Ray gives its workers niceness 15, to which 4 can be added at most: a third of a core. There, Linux' policy for idle
    work gives a twelfth, and such work never keeps a core from others that wake up.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) + NICENESS > _LAST and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(NICENESS)


def lower_thread_priority(thread: int) -> None:
    """Of another thread of this process, on Linux, by its native id. Not for idle work alone: it has to take the
    interpreter's lock in the end, and must not wait for a core with it."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, thread, min(_LAST, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS))
