"""`lower_priority`: of a process of ours that must leave the cores to the step loops."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Final

NICENESS: Final = 10
"""Beside the caller's: a tenth of a core that a step loop wants as well."""
_LAST: Final = 19
_SCHEDULED: Final = 2
"""CPUCLOCK_SCHED: with the process id, the number of its clock, as `clock_getcpuclockid` returns it."""


def lower_priority(process: int = 0) -> None:
    """Of a process of one thread, this one by default, and of what it starts.

    Ray gives its workers niceness 15, to which 4 can be added at most: a third of a core. There, Linux' policy for idle
    work gives a twelfth, and such work never keeps a core from others that wake up.

    The process must be in the step loops' session: Linux may schedule sessions in turns (sched_autogroup_enabled), and
    a low priority in one is none beside another.
    """
    with contextlib.suppress(ProcessLookupError):
        lower = os.getpriority(os.PRIO_PROCESS, process) + NICENESS
        if lower > _LAST and sys.platform == "linux":
            os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, process, min(lower, _LAST))


def lower_all_threads() -> None:
    """`lower_priority` of a process of several threads, this one; Linux."""
    for thread in os.listdir("/proc/self/task"):
        lower_priority(int(thread))


def processor_time_s(process: int) -> float | None:
    """The processor time of a process; None if it has ended, or where that is not known."""
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime((~process << 3) | _SCHEDULED)
    except OSError:
        return None


def lower_thread_priority(thread: int) -> None:
    """Of another thread of this process, on Linux, by its native id. Not for idle work alone: it has to take the
    interpreter's lock in the end, and must not wait for a core with it."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, thread, min(_LAST, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS))
