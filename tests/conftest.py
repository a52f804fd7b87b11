"""What holds for all tests.

Hypothesis draws the same examples every time, with no limit on how long one takes; `pytest --hypothesis-profile=search`
draws new ones. Ray does not kill our processes where others fill the machine's memory. Tests of whole services are
slow.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
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
OVERLAP = "TENSORWEAVE_TEST_OVERLAP"
"""Set for processes of tests under --overlap."""

LONG = "TENSORWEAVE_TEST_LONG"
"""Set to 1, the tests that are marked as long run too."""

HERE = Path(__file__).parent
WHOLE_SERVICES = (HERE / "e2e", HERE / "chaos")
PUBLIC_DEFAULTS = HERE / "unittest" / "api_stability"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in WHOLE_SERVICES):
            item.add_marker(pytest.mark.slow)
        if (long := item.get_closest_marker("long")) is not None and os.environ.get(LONG) != "1":
            item.add_marker(pytest.mark.skip(reason=f"{long.args[0]}: {LONG}=1 runs it"))
        if config.getoption("--overlap") and PUBLIC_DEFAULTS in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="--overlap changes a public default, which this test checks"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overlap", action="store_true", help="launch each step before the one before it has settled")


def pytest_configure(config: pytest.Config) -> None:
    """Executors overlap their steps unless the test says otherwise. A service's ranks receive the arguments that are
    set, so here the knob is always set; a service that a test starts as a command is given it there."""
    if not config.getoption("--overlap"):
        return
    os.environ[OVERLAP] = "1"
    from tensorweave.cluster.llm_args import TorchLlmArgs
    from tensorweave.workers.executor.executor import PyExecutor

    PyExecutor.__init__.__kwdefaults__["disable_overlap_scheduler"] = False
    init = TorchLlmArgs.__init__

    def init_overlapped(self: TorchLlmArgs, **fields: Any) -> None:
        init(self, **{"disable_overlap_scheduler": False, **fields})

    TorchLlmArgs.__init__ = init_overlapped  # type: ignore[method-assign]
