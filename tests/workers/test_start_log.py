"""Each part of a start is reported while it runs and logged when it is over."""

from __future__ import annotations

import itertools
import logging

import pytest

from tensorweave.workers.start_log import StartLog


def test_parts_are_reported_timed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    phases: list[str] = []
    ticks = itertools.count(0.0, 1.5)
    log = StartLog(phases.append, clock=lambda: next(ticks))
    with caplog.at_level(logging.INFO), log.part("loading the weights") as tell:
        tell(0.25)
        tell(1.0)
    with log.part("warming up"):
        pass
    assert phases == ["loading the weights", "loading the weights (25%)", "loading the weights (100%)", "warming up"]
    assert log.durations == {"loading the weights": 1.5, "warming up": 1.5}
    assert "loading the weights took 1.50 s" in caplog.text


def fail(log: StartLog) -> None:
    with log.part("loading the weights"):
        raise KeyError


def test_a_part_that_fails_has_no_time() -> None:
    log = StartLog()
    with pytest.raises(KeyError):
        fail(log)
    assert log.durations == {}
