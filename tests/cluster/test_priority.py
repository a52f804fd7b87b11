"""Work of ours that can wait gives way: a tenth of a core beside step loops, whatever niceness those have."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tensorweave.cluster.priority import NICENESS, lower_priority, lower_thread_priority, processor_time_s

LOWERED = """
import os
from tensorweave.cluster.priority import lower_priority
os.nice({0} - os.getpriority(os.PRIO_PROCESS, 0))
lower_priority()
print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_IDLE)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has a policy for idle work")
@pytest.mark.parametrize(("niceness", "printed"), [(9, "19 False"), (15, "15 True"), (19, "19 True")])
def test_a_process_takes_little_beside_its_parent(niceness: int, printed: str) -> None:
    if os.getpriority(os.PRIO_PROCESS, 0) > niceness:
        pytest.skip("these tests run at a lower priority themselves")
    child = subprocess.run(
        [sys.executable, "-c", LOWERED.format(niceness)], capture_output=True, text=True, timeout=60, check=True
    )
    assert child.stdout.strip() == printed


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_a_thread_alone_has_a_lower_priority() -> None:
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, args=(60,))
    thread.start()
    try:
        own, native_id = os.getpriority(os.PRIO_PROCESS, 0), thread.native_id
        assert native_id is not None
        lower_thread_priority(native_id)
        assert os.getpriority(os.PRIO_PROCESS, native_id) == min(own + NICENESS, 19)
        assert os.getpriority(os.PRIO_PROCESS, 0) == own
    finally:
        may_end.set()
        thread.join(60)
    lower_thread_priority(native_id)  # it has ended


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process's time by its number")
def test_the_processor_time_of_another_process() -> None:
    spinning = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", spinning], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent_s = processor_time_s(child.pid)
        assert spent_s is not None
        assert 0.2 <= spent_s < 60
        lower_priority(child.pid)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) > os.getpriority(os.PRIO_PROCESS, 0) or is_idle(child.pid)
        child.communicate(b"\n", timeout=60)
    assert processor_time_s(child.pid) is None
    lower_priority(child.pid)  # it has ended


def is_idle(process: int) -> bool:
    return os.sched_getscheduler(process) == os.SCHED_IDLE
