"""A forked child gets an error at once from every call on its parent's LLM, which goes on unharmed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.llmapi import forked_child

NUM_CALLS = 17


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_forked_child_is_told_so_and_harms_nothing(directory: Path, num_ranks: int) -> None:
    command = [sys.executable, forked_child.__file__, str(directory), str(num_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    lines = done.stdout.splitlines()
    child = [line for line in lines if line.startswith("child ")]
    errors = [line for line in child if "cannot be used in process" in line and "which was forked from it" in line]
    assert len(errors) == NUM_CALLS, done.stdout + done.stderr
    assert set(child) - set(errors) == {"child finished: True"}
    assert lines[len(child) :] == [
        "parent saw 7",
        "parent workspace: True",
        "parent still runs: True",
        "parent generates: True",
        "parent closed",
    ], done.stdout + done.stderr
    assert done.returncode == 0
