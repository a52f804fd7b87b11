"""Log lines as text and as JSON, ours from a level on and others' warnings, and what Ray forwards of other ones."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tensorweave.cluster.forwarded_lines import as_json, print_as_json
from tensorweave.cluster.log_setup import LogSettings, formatter_of, set_up_logging


@pytest.fixture
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, "tensorweave", "some")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("restored")
def lines_of(settings: LogSettings) -> list[str]:
    stream = io.StringIO()
    set_up_logging(settings, "pools", stream)
    set_up_logging(settings, "pools 100%", stream)
    ours, theirs = logging.getLogger("tensorweave.cluster.pool"), logging.getLogger("some.library")
    ours.info("gang %s is ready", "g-1")
    logging.getLogger("some").setLevel(logging.DEBUG)
    theirs.info("never")
    theirs.warning("theirs")
    warnings.warn("odd\nthing", UserWarning, stacklevel=1)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        ours.exception("failed")
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("restored")
def test_each_line_is_an_object() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        entries = [json.loads(line) for line in lines_of(LogSettings("json", "INFO"))]
    ready, theirs, odd, failed = entries
    assert (ready["level"], ready["message"], ready["logger"]) == (
        "INFO",
        "gang g-1 is ready",
        "tensorweave.cluster.pool",
    )
    assert (ready["process"], ready["pid"]) == ("pools 100%", os.getpid())
    assert ready["time"].endswith("Z")
    assert (theirs["level"], theirs["message"]) == ("WARNING", "theirs")
    assert "odd\nthing" in odd["message"]
    assert failed["exception"].endswith("RuntimeError: broken")


@pytest.mark.usefixtures("restored")
def test_as_text_from_a_level_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = lines_of(LogSettings("text", "ERROR"))
    assert lines[0].endswith(" WARNING pools 100%: theirs")
    assert lines[1].endswith(" ERROR pools 100%: failed")
    assert lines[2:3] == ["Traceback (most recent call last):"]


def test_fields_are_keys_and_cannot_break_the_line() -> None:
    record = logging.makeLogRecord({"msg": "request", "fields": {"path": 'a"\n{', "odd": object}})
    entry = json.loads(formatter_of("json", "router").format(record))
    assert (entry["path"], entry["odd"]) == ('a"\n{', "<class 'object'>")


def test_what_ray_forwards_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    ours = formatter_of("json", "supervisor").format(logging.makeLogRecord({"msg": "ours"}))
    data: dict[str, Any] = {"pid": 7, "ip": "10.0.0.9", "actor_name": "RankWorker", "is_err": True}
    print_as_json({**data, "lines": [ours, "Killed", '{"time": broken']})
    first, *others = capsys.readouterr().err.splitlines()
    assert first == ours
    assert [json.loads(line)["message"] for line in others] == ["Killed", '{"time": broken']
    wrapped = json.loads(others[0])
    assert (wrapped["process"], wrapped["pid"], wrapped["host"], wrapped["logger"]) == (
        "RankWorker",
        7,
        "10.0.0.9",
        "ray",
    )
    assert json.loads(as_json("x", {"pid": "raylet"}))["process"] == "ray"
