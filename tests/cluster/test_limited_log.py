"""Strangers cannot fill the log."""

from __future__ import annotations

import logging

import pytest

from tensorweave.cluster.limited_log import INTERVAL_S, LimitedLog


def test_one_line_per_interval_with_the_number_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [1000.0]
    log = LimitedLog(logging.getLogger("listener"), logging.WARNING, clock=lambda: now_s[0])
    for number in range(2838):
        log.write(f"garbage {number}")
    now_s[0] += INTERVAL_S
    log.write("garbage again")
    now_s[0] += INTERVAL_S
    log.write("and again")
    assert [record.getMessage() for record in caplog.records if record.name == "listener"] == [
        "garbage 0",
        "garbage again (2837 more since the last such line)",
        "and again",
    ]
