"""What the guard of a rank's process tells of a thread that keeps the interpreter locked."""

from __future__ import annotations

import os
import select
import subprocess
import sys

from tests.workers.waiting import WAIT_S

LOCKING = """
import ctypes, os, sys
from tensorweave.workers.rank_process import ProcessGuard

def wait_with_the_interpreter_locked():
    ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)

guard = ProcessGuard(lambda: False, lambda: None, blocked_s=1.5)
guard.start(None)
wait_with_the_interpreter_locked()
guard.stop()
print("goes on")
"""


def test_stacks_are_written_while_the_interpreter_is_locked() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", LOCKING], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdin is not None
            assert process.stderr is not None
            seen = b""
            while b"wait_with_the_interpreter_locked" not in seen:
                assert select.select([process.stderr], [], [], WAIT_S)[0], seen
                told = os.read(process.stderr.fileno(), 65536)
                assert told, seen
                seen += told
            out, _ = process.communicate(b"x", WAIT_S)
        finally:
            process.kill()
    assert out == b"goes on\n"
    assert process.returncode == 0
