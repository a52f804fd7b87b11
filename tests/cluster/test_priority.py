"""A process of ours gives way before it has done anything."""

from __future__ import annotations

import os
import subprocess

from tensorweave.cluster.priority import lower_priority


def test_a_process_has_a_lower_priority_and_so_has_what_it_starts() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with subprocess.Popen(["sh", "-c", "read -r line; nice"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        lower_priority(child.pid, 3)
        printed, _ = child.communicate(b"\n", timeout=60)
    assert int(printed) == min(own + 3, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_one_that_has_ended_is_left_alone() -> None:
    child = subprocess.Popen(["true"])
    child.wait(60)
    lower_priority(child.pid, 3)
