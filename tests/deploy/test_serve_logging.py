"""Our log records in a Serve replica keep their level and a readable traceback."""

from __future__ import annotations

import builtins
import io
import logging
import sys
from collections.abc import Iterator

import pytest
from ray.serve._private import logging_utils
from ray.serve._private.constants import SERVE_LOGGER_NAME

from tensorweave.cluster.log_setup import LogSettings
from tensorweave.deploy.serve_logging import log_in_replica


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Serve's log, in a process where it has put its own `print` and standard error."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    serve, ours = logging.getLogger(SERVE_LOGGER_NAME), logging.getLogger("tensorweave")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(ours, "level", ours.level)
    monkeypatch.setattr(serve, "handlers", [handler])
    monkeypatch.setattr(ours, "handlers", ours.handlers)
    monkeypatch.setattr(ours, "propagate", ours.propagate)
    monkeypatch.setattr(builtins, "print", logging_utils.redirected_print)
    monkeypatch.setattr(sys, "stderr", logging_utils.StreamToLogger(serve, logging.INFO, sys.stderr))
    yield text
    logging.captureWarnings(False)


def test_an_error_is_an_error_and_its_traceback_readable(log: io.StringIO) -> None:
    log_in_replica(LogSettings(), "router r")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("tensorweave.router.http.endpoint").exception("request 7: internal error")
    lines = log.getvalue().splitlines()
    assert lines[:2] == ["ERROR request 7: internal error", "Traceback (most recent call last):"]
    assert lines[-1] == "RuntimeError: broken"
    assert not [line for line in lines if line.startswith("(")]
