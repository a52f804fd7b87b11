"""`tensorweave chaos` over real services of two gangs: no client notices a fault, or the tool reports it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tensorweave.cli.serve import config_path
from tests.e2e.service_process import (
    REPOSITORY,
    alive,
    free_ports,
    overlap_arguments,
    service_environment,
    wait_until,
)

CHAOS_YAML = config_path(None).parent / "chaos.yaml"
KEYS = ["fault", "injected", "requests", "failed", "changed", "recover_s_median", "recover_s_max"]
AGGREGATED = ["pools={main: {replicas: 2}}"]
ON_ONE_GPU = ["engine.device=cuda", "engine.gpus_per_rank=0.25"]
RUN_TIMEOUT_S = 420.0
END_TIMEOUT_S = 150.0
NUM_LINES = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def all_told(told: str, out: Path) -> str:
    """By the tool, and at last by its services."""
    lines = log_of(out).read_text(errors="replace").splitlines() if log_of(out).exists() else []
    return "\n".join([told, "the services' last lines:", *lines[-NUM_LINES:]])


@contextmanager
def chaos(out: Path, *arguments: str, changes: list[str]) -> Iterator[subprocess.Popen[str]]:
    port, _, proxy_port, admin_port = free_ports(4)
    command = [sys.executable, "-m", "tensorweave.cli.main", "chaos", "--config", str(CHAOS_YAML), "--json", str(out)]
    command += ["--log", str(log_of(out))]
    ports = (f"router.port={port}", f"router.proxy_port={proxy_port}", f"admin.port={admin_port}")
    for change in (*changes, *ports):
        command += ["--set", change]
    command += overlap_arguments()
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=service_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_TIMEOUT_S)


def test_clients_notice_no_fault(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = (
        "--rounds",
        "1",
        "--faults",
        "kill,kill-router,kill-supervisor,drain",
        "--clients",
        "16",
        "--jobs",
        "24",
    )
    with chaos(out, *arguments, changes=AGGREGATED) as process:
        table, told = process.communicate(timeout=RUN_TIMEOUT_S)
        told = all_told(told, out)
    assert process.returncode == 0, told
    rows = json.loads(out.read_text())
    assert [list(row) for row in rows] == [KEYS] * 4
    faults = ["kill-both-0", "kill-router", "kill-supervisor", "drain"]
    assert [row["fault"] for row in rows] == faults
    for row in rows:
        assert row["injected"] == 1
        assert row["requests"] >= 16, told
        assert (row["failed"], row["changed"]) == (0, 0), told
        assert row["recover_s_max"] is not None, told
        assert row["recover_s_max"] < 60, told
    assert [line.split()[0] for line in table.splitlines()] == ["fault", *faults]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_clients_notice_no_fault_on_a_gpu(tmp_path: Path) -> None:
    """Two gangs of each role share one GPU; one of each role is killed."""
    out = tmp_path / "out.json"
    arguments = ("--rounds", "1", "--faults", "kill", "--clients", "16", "--jobs", "24")
    with chaos(out, *arguments, changes=ON_ONE_GPU) as process:
        _, told = process.communicate(timeout=RUN_TIMEOUT_S)
        told = all_told(told, out)
    assert process.returncode == 0, told
    rows = json.loads(out.read_text())
    assert [row["fault"] for row in rows] == ["kill-prefill-0", "kill-decode-0"]
    for row in rows:
        assert row["injected"] == 1
        assert (row["failed"], row["changed"]) == (0, 0), told


@pytest.mark.long("takes half a minute")
def test_failures_are_reported_and_a_signal_ends_all(tmp_path: Path) -> None:
    """Without recovery a killed gang's requests fail. Then SIGTERM in a later round: everything ends in order.

    The only gang is killed, and most of its requests have not begun: none can have ended before."""
    out = tmp_path / "out.json"
    arguments = ("--rounds", "1", "--faults", "kill,none,drain", "--clients", "16", "--jobs", "16")
    changes = ["pools={main: {replicas: 1}}", "engine.max_batch_size=4", "limits.max_attempts=1"]
    with chaos(out, *arguments, changes=changes) as process:
        wait_until(lambda: out.exists() or process.poll() is not None, RUN_TIMEOUT_S, "the first fault's round is over")
        family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=END_TIMEOUT_S)
        told = all_told(told, out)
    assert process.returncode == 130, told
    wait_until(lambda: not alive(family), END_TIMEOUT_S, "no process is left")
    row, *later = json.loads(out.read_text())
    assert len(later) <= 1, "the last round did not end"
    assert row["failed"] > 0, told
    assert row["changed"] == 0, told
    assert "chaos:   failed: " in told, told
