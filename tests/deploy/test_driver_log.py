"""The driver's lines: with our name as text, or as objects; and everything is as before afterwards."""

from __future__ import annotations

import json
import logging

import pytest
from ray._private import worker

from tensorweave.cluster.log_setup import LogSettings
from tensorweave.deploy.driver_log import driver_log
from tensorweave.deploy.progress import report

FORWARDED = {"pid": 7, "ip": "10.0.0.9", "actor_name": "RankWorker", "is_err": True, "lines": ["one line"]}


def test_progress_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with driver_log(LogSettings(level="ERROR")):
        report("starting Ray")
    report("not written")
    assert capsys.readouterr().err == "tensorweave: starting Ray\n"


def test_everything_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's own filter, which asks the cluster: most of what an autoscaler writes is not for drivers.
    monkeypatch.setattr(worker, "filter_autoscaler_events", lambda lines: [line for line in lines if "events" in line])
    handlers, print_before = list(logging.getLogger().handlers), worker.print_to_stdstream
    with driver_log(LogSettings("json")):
        report("starting Ray")
        logging.getLogger("tensorweave.deploy.monitor").warning("odd")
        worker.print_to_stdstream(FORWARDED, False)
        worker.print_to_stdstream({**FORWARDED, "pid": "autoscaler", "lines": ["it took 0.0 s", "events"]}, False)
    entries = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(entry["process"], entry["level"], entry["message"]) for entry in entries] == [
        ("driver", "INFO", "starting Ray"),
        ("driver", "WARNING", "odd"),
        ("RankWorker", "INFO", "one line"),
        ("RankWorker", "INFO", "events"),
    ]
    assert (logging.getLogger().handlers, worker.print_to_stdstream) == (handlers, print_before)
