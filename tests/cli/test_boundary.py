"""Whatever a command raises ends as one sentence; what nobody foresaw leaves its traceback in a file."""

from __future__ import annotations

import argparse
import errno
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import ray
from ray.exceptions import RaySystemError, RayTaskError

from tensorweave.cli import main as main_module
from tensorweave.cli.main import main
from tensorweave.cluster import ray_session
from tensorweave.cluster.errors import RequestRejected, WorkerLost
from tensorweave.cluster.ray_noise import is_noise, without_noise
from tensorweave.cluster.ray_session import RayFailed, start_or_join_ray
from tensorweave.deploy.config import load_config
from tensorweave.deploy.service import run as run_service

Raiser = Callable[[Exception], int]


@pytest.fixture
def failing_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Raiser:
    """The command line, with a command that raises what it is given."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run_with(error: Exception) -> int:
        def run(args: argparse.Namespace) -> int:
            raise error

        parser = argparse.ArgumentParser()
        parser.set_defaults(run=run, traceback=False)
        monkeypatch.setattr(main_module, "build_parser", lambda: parser)
        return main([])

    return run_with


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("model is missing"), 2, "model is missing"),
        (RequestRejected("no such model"), 2, "no such model"),
        (WorkerLost("rank 1 died"), 1, "rank 1 died"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), 1, "No space left on device: /full/file"),
        (PermissionError(errno.EACCES, "Permission denied", "out.json"), 1, "Permission denied: out.json"),
        (ConnectionError("no Ray at 10.0.0.1"), 1, "ConnectionError: no Ray at 10.0.0.1"),
    ],
)
def test_expected_errors_are_one_sentence(
    failing_main: Raiser,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: Exception,
    code: int,
    sentence: str,
) -> None:
    assert failing_main(error) == code
    assert capsys.readouterr().err == f"tensorweave: {sentence}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (TypeError("'NoneType' object is not iterable"), "TypeError: 'NoneType' object is not iterable"),
        (KeyError("pools"), "KeyError: 'pools'"),
        (httpx.ReadTimeout("timed out"), "ReadTimeout: timed out"),
        (RaySystemError("the object store\nis gone"), "RaySystemError: System error: the object store"),
        (Exception("The current node timed out during startup."), "The current node timed out during startup."),
        (
            RayTaskError("f", 'f()\n  File "f.py", line 1, in f\nTypeError: no', TypeError("no")),
            "RayTaskError: TypeError: no",
        ),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_unexpected_error_keeps_its_traceback_in_a_file(
    failing_main: Raiser, capsys: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    assert failing_main(error) == 1
    [line] = capsys.readouterr().err.splitlines()
    told = re.match(r"tensorweave: (.*) \(an error that tensorweave did not expect; its traceback is in (\S+),", line)
    assert told is not None, line
    assert told[1] == sentence
    assert "raise error" in Path(told[2]).read_text(encoding="utf-8")


def test_a_traceback_that_cannot_be_kept_is_shown(
    failing_main: Raiser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert failing_main(TypeError("a bug")) == 1
    shown = capsys.readouterr().err
    assert "raise error" in shown
    assert shown.splitlines()[-1].startswith("tensorweave: TypeError: a bug (")


def test_a_ray_that_does_not_start_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ray raises bare exceptions then. In all ways to start it."""

    def fail(**arguments: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because …")

    monkeypatch.setattr(ray_session.ray, "init", fail)
    monkeypatch.setattr(ray_session, "check_ray_address", lambda address: None)  # a head answers there
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RayFailed, match=r"Ray cannot be started: The current node timed out during startup\. \(Ray's"):
        start_or_join_ray()
    with pytest.raises(RayFailed, match=r"Ray at 10\.0\.0\.1:6379 cannot be joined: The current node timed out"):
        start_or_join_ray("10.0.0.1:6379")

    file = tmp_path / "service.yaml"
    file.write_text(f"model: {tmp_path}\n")
    (tmp_path / "config.json").write_text("{}")
    assert run_service(load_config(file)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tensorweave: starting Ray"
    assert lines[1].startswith("tensorweave: cannot start: Ray cannot be started: The current node timed out")
    assert len(lines) == 2


NOISE = (
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the task will be retried. "
    "Error: The actor is dead because it was killed by `ray.kill`."
)


def test_only_a_controller_that_ends_itself_is_noise(capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    real = [
        "Task ServeController.listen_for_change failed. There are infinite retries remaining, so the task will be "
        "retried. Error: The actor died unexpectedly before finishing this task.",
        "Task RankWorker.start failed. Error: The actor is dead because it was killed by `ray.kill`.",
        "A worker died or was killed while executing a task by an unexpected system error.",
    ]
    assert is_noise(NOISE)
    assert is_noise(NOISE.replace("graceful_shutdown", "listen_for_change"))
    assert not any(map(is_noise, real))
    before = worker.print_to_stdstream
    with without_noise():
        for line in (NOISE, *real):
            worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert worker.print_to_stdstream is before
    printed = capsys.readouterr().out
    assert all(line in printed for line in real)
    assert "graceful_shutdown" not in printed
