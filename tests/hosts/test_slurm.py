"""The job scripts on a Slurm of three hosts, which slurm_on_hosts.sh sets up; needs root and Debian's slurm-wlm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.service_process import write_model

NEEDED = ("slurmctld", "slurmd", "sbatch", "scancel", "munged", "curl")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
SCRIPT = Path(__file__).with_name("slurm_on_hosts.sh")


@pytest.mark.slurm
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize(
    "part",
    [
        "drains_and_ends",
        "survives_a_lost_host",
        "is_queued_anew_without_its_first_host",
        "drains_at_its_time_limit",
        "serves_heterogeneous",
        "finishes_a_batch_across_requeues",
        "puts_a_load_on_a_service",
    ],
)
def test_a_job(tmp_path: Path, part: str) -> None:
    activate = Path(sys.executable).parent / "activate"
    done = subprocess.run(
        [str(SCRIPT), str(write_model(tmp_path / "model")), part],
        env={**os.environ, "TENSORWEAVE_ACTIVATE": str(activate)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3500,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("PASSED")
