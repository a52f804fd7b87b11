"""`lower_priority`: of a process of ours that must leave the cores to the step loops."""

from __future__ import annotations

import contextlib
import os


def lower_priority(task: int, niceness: int) -> None:
    """Let a process, or on Linux a thread, and what it starts from now on, have this niceness beside the caller's.

    The parent of a process calls it at once: until a process can do so itself, Python and its imports take a second.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, task, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
