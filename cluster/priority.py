"""`lower_priority`: of a process of ours that must leave the cores to the step loops."""

from __future__ import annotations

import contextlib
import os


def lower_priority(task: int, niceness: int) -> None:
    """Let a process of one thread, or on Linux a thread, and what it starts from now on, have this niceness beside the
    caller's."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, task, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
