"""A private Ray stands apart from the process group of whoever starts it: a signal to that group reaches us alone, and
there is still a Ray to drain with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e.service_process import END_TIMEOUT_S, START_TIMEOUT_S, alive, command_of, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
OWNER = """
import os, signal
import ray
from tensorweave.cluster.ray_session import start_or_join_ray
with start_or_join_ray() as session:
    reader, writer = os.pipe()
    signal.signal(signal.SIGTERM, lambda number, frame: os.write(writer, b"!"))
    print("up", flush=True)
    os.read(reader, 1)
    print("told, and there are", int(ray.cluster_resources()["CPU"] > 0), "Rays", flush=True)
    os.read(reader, 1)
"""
DAEMONS = ("ray/core/src/ray/gcs/gcs_server ", "ray/core/src/ray/raylet/raylet ")


@pytest.mark.slow
def test_a_signal_to_our_group_leaves_ray_alone_and_our_death_does_not() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        family = psutil.Process(owner.pid).children(recursive=True)
        daemons = [process for process in family if any(name in command_of(process) for name in DAEMONS)]
        assert len(daemons) >= len(DAEMONS)
        assert owner.pid not in [os.getpgid(process.pid) for process in daemons]
        # of its node's agent: on Ray's fixed port a second Ray would start 4 s later
        assert any("--listen-port=0" in command_of(process) for process in daemons)

        os.killpg(owner.pid, signal.SIGTERM)
        assert owner.stdout.readline() == "told, and there are 1 Rays\n"
        assert len(alive(daemons)) == len(daemons)
    finally:
        owner.kill()
        owner.wait(START_TIMEOUT_S)
        if owner.stdout is not None:
            owner.stdout.close()
    wait_until(lambda: not alive(daemons), END_TIMEOUT_S, "Ray has died with its owner")
