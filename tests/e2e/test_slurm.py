"""slurm/serve.sbatch on a Slurm of two hosts, which slurm_two_hosts.sh sets up; needs root and Debian's slurm-wlm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.service_process import write_model

NEEDED = ("slurmctld", "slurmd", "sbatch", "scancel", "munged", "ip", "nsenter", "unshare", "curl")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
SCRIPT = Path(__file__).with_name("slurm_two_hosts.sh")
WHY_NOT = (
    "takes minutes and makes network namespaces: set TENSORWEAVE_TEST_SLURM=1 to run it"
    if os.environ.get("TENSORWEAVE_TEST_SLURM") != "1"
    else f"not installed: {', '.join(MISSING)}"
    if MISSING
    else "needs root"
    if os.geteuid()
    else ""
)


@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize(
    "part",
    ["drains_and_ends", "survives_a_lost_host", "is_queued_anew_without_its_first_host", "serves_heterogeneous"],
)
def test_a_job_on_two_hosts(tmp_path: Path, part: str) -> None:
    activate = Path(sys.executable).parent / "activate"
    done = subprocess.run(
        [str(SCRIPT), str(write_model(tmp_path / "model")), part],
        env={**os.environ, "TENSORWEAVE_ACTIVATE": str(activate)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=860,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("PASSED")
