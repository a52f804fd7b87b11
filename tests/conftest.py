"""How all tests draw their examples: the same ones every time, and no limit on how long one takes.

`pytest --hypothesis-profile=search` draws new ones, to find what the usual ones do not. And what all tests ask of Ray:
not to kill our processes where others fill the machine's memory.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")

NO_MEMORY_MONITOR = "RAY_memory_monitor_refresh_ms"
os.environ[NO_MEMORY_MONITOR] = "0"
