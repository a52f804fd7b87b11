"""Ray's own command line (`ray start …`), for nodes that last: `tensorweave ray`, which the Slurm scripts use too.

Ray ends a node whose agents end, and gives it 30 s to start, which a busy host or a slow file system exceeds.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from tensorweave.cluster.ray_internals import kept_agents, patient_start, run_command_line

START_TIMEOUT_S: Final = 240.0
_AGENT_TIMEOUT: Final = "RAY_agent_register_timeout_ms"
"""How long the raylet waits for its agents' answers before it ends."""


def run_ray(arguments: Sequence[str]) -> NoReturn:
    """Run `ray` with these arguments. Raises SystemExit with its exit code."""
    os.environ.setdefault(_AGENT_TIMEOUT, str(int(START_TIMEOUT_S * 1000)))
    agents = kept_agents() if sys.platform == "linux" else contextlib.nullcontext()
    with agents, patient_start(START_TIMEOUT_S):
        run_command_line(arguments)
