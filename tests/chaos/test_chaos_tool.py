"""`tensorweave chaos` over real services of two gangs: nobody notices a fault, or else the tool says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tensorweave.cli.serve import config_path
from tests.e2e.service_process import REPOSITORY, alive, free_ports, wait_until

CHAOS_YAML = config_path(None).parent / "chaos.yaml"
KEYS = ["fault", "injected", "requests", "failed", "changed", "recover_s_median", "recover_s_max"]
AGGREGATED = ["pools={main: {replicas: 2}}"]
RUN_TIMEOUT_S = 280.0

pytestmark = pytest.mark.slow


@contextmanager
def chaos(out: Path, *arguments: str, changes: list[str]) -> Iterator[subprocess.Popen[str]]:
    port, _, proxy_port = free_ports(3)
    command = [sys.executable, "-m", "tensorweave.cli.main", "chaos", "--config", str(CHAOS_YAML), "--json", str(out)]
    for change in (*changes, f"router.port={port}", f"router.proxy_port={proxy_port}"):
        command += ["--set", change]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_nobody_notices(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("--rounds", "1", "--faults", "kill,kill-router,drain", "--clients", "16", "--jobs", "24")
    with chaos(out, *arguments, changes=AGGREGATED) as process:
        table, told = process.communicate(timeout=RUN_TIMEOUT_S)
    rows = json.loads(out.read_text())
    assert [list(row) for row in rows] == [KEYS] * 3
    assert [row["fault"] for row in rows] == ["kill-both-0", "kill-router", "drain"]
    for row in rows:
        assert row["injected"] == 1
        assert row["requests"] >= 16
        assert (row["failed"], row["changed"]) == (0, 0), told
        assert 0 < row["recover_s_max"] < 60
    assert process.returncode == 0, told
    assert [line.split()[0] for line in table.splitlines()] == ["fault", "kill-both-0", "kill-router", "drain"]


def test_what_fails_is_told_and_a_signal_ends_all(tmp_path: Path) -> None:
    """Without recovery a killed gang's requests fail. Then SIGTERM in the next round: everything ends in order."""
    out = tmp_path / "out.json"
    arguments = ("--rounds", "1", "--faults", "kill,none", "--clients", "16", "--jobs", "16")
    changes = [*AGGREGATED, "limits.max_attempts=1"]
    with chaos(out, *arguments, changes=changes) as process:
        wait_until(out.exists, RUN_TIMEOUT_S, "the first fault's rounds are over")
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=90)
    assert process.returncode == 130, told
    assert not alive(family)
    (row,) = json.loads(out.read_text())
    assert row["failed"] > 0
    assert row["changed"] == 0
    assert "chaos:   failed: " in told
