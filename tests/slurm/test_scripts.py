"""The job scripts and ray_node.sh with a made-up Slurm, Ray and service: programs on the path that write down what
they are called with and stay until they are told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
# What stays: it ends with 0 when it is asked to, from before it has written down that it is there. What a test waits
# for is there as a whole: `tell FILE WORD...` writes it under another name first.
TELL = 'tell() { echo "${@:2}" > "$RECORDS/.$1.$$"; mv "$RECORDS/.$1.$$" "$RECORDS/$1"; }'
END_WELL = "trap 'kill $! 2> /dev/null; exit 0' TERM; "
STAY = "sleep 600 & wait"
FAKES = {
    # Named by the node, so that a test can lose it; the node's script, which starts once its name is there, gets the
    # signal, as from Slurm.
    "srun": """
        for word in "$@"; do case $word in --nodelist=*) node=${word#--nodelist=} ;; esac; done
        echo "$TENSORWEAVE_NODE $TENSORWEAVE_CPUS $*" >> "$RECORDS/srun"
        while [ "$1" != bash ]; do shift; done
        trap 'kill -TERM $!; wait $!; exit' TERM
        { until [ -e "$RECORDS/node-$node" ]; do sleep 0.05; done; exec "$@"; } &
        tell "node-$node" $$ $!
        wait $!""",
    "scontrol": """
        case $1 in
          requeue) echo "$2" >> "$RECORDS/requeue" ;;
          *) echo "$3" | tr , "\\n" ;;
        esac""",
    "scancel": """
        echo "$*" >> "$RECORDS/scancel"
        for node in "$RECORDS"/node-*; do read -r srun _ < "$node"; kill "$srun"; done""",
    # On the node RAY_FAILS_ON the first start of Ray fails; on RAY_ENDS_ON Ray ends once the service is started.
    "python": """
        case "$*" in
          -c*) exec python3 "$@" ;;
          "-m tensorweave.cli.main ray start "*) """
    + END_WELL
    + """
            if [ "$TENSORWEAVE_NODE" = "$RAY_FAILS_ON" ] && mkdir "$RECORDS/failed" 2> /dev/null; then exit 1; fi
            echo "$TENSORWEAVE_NODE $*" >> "$RECORDS/ray"
            if [ "$TENSORWEAVE_NODE" = "$RAY_ENDS_ON" ]; then
              until [ -e "$RECORDS/serve" ]; do sleep 0.1; done
              exit 1
            fi
            """
    + STAY
    + """ ;;
          *requeue_orphan.py*) echo "$TENSORWEAVE_NODE" >> "$RECORDS/orphans" ;;
          *await_nodes.py*)
            echo "$2" > "$RECORDS/awaited"
            until [ "$(wc -l < "$RECORDS/ray")" = "$2" ]; do sleep 0.1; done ;;
          *batch*)
            trap 'kill $! 2> /dev/null; exit 3' TERM
            tell batch "$*"
            """
    + STAY
    + """ ;;
          *bench*) tell bench "$*"; exit 5 ;;
          *serve*) """
    + END_WELL
    + """cp "$RAY_AUTH_TOKEN_PATH" "$RECORDS/token"; tell serve "$*"
            while [ "$1" != --endpoint-file ]; do shift; done
            echo http://10.0.0.1:8000 > "$2.new"; mv "$2.new" "$2"; """
    + STAY
    + """ ;;
        esac""",
}


class Job:
    """A run of a job script; `records` holds what the made-up programs wrote down."""

    def __init__(self, directory: Path, **variables: str) -> None:
        self.records = directory / "records"
        self.state = directory / "state"
        programs = directory / "bin"
        for each in (self.records, self.state, programs):
            each.mkdir()
        for name, text in FAKES.items():
            (programs / name).write_text(f"#!/bin/bash\n{TELL}\n{text}\n")
            (programs / name).chmod(0o755)
        activate = directory / "activate"
        activate.write_text(f"export PATH={programs}:$PATH RECORDS={self.records}\n")
        self.id = str(10_000_000 + os.getpid())
        self.environment = {
            "PATH": os.environ["PATH"],
            "SLURM_JOB_ID": self.id,
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_NODELIST": "n1,n2",
            "SLURM_CPUS_PER_TASK": "3",
            "TENSORWEAVE_ACTIVATE": str(activate),
            "TENSORWEAVE_STATE": str(self.state),
            "TENSORWEAVE_ADDRESS": "10.0.0.1",
            "TENSORWEAVE_ENDPOINT": str(directory / "endpoint"),
            **variables,
        }
        self.log = directory / "log"
        self.endpoint = directory / "endpoint"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def private(self) -> Path:
        return self.state / f".tensorweave-job-{self.id}"

    def start(self, script: str = "serve", *arguments: str) -> None:
        """Returns once the script has started the program that it is named after."""
        arguments = arguments or ("--config", "s.yaml")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", str(REPOSITORY / "slurm" / f"{script}.sbatch"), *arguments],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.until(lambda: (self.records / script).exists(), f"{script} is started")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline_s, f"not in time: {what}\n{self.said()}"
            time.sleep(0.05)

    def lose(self, node: str) -> None:
        """As by a power cut: its srun ends, and all that ran there."""
        pids = [int(pid) for pid in (self.records / f"node-{node}").read_text().split()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def drain(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(timeout=PATIENCE_S)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, name: str) -> list[str]:
        return sorted((self.records / name).read_text().splitlines())

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # lost nodes leave theirs behind
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=PATIENCE_S)


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(**variables: str) -> Job:
        jobs.append(Job(tmp_path, **variables))
        return jobs[-1]

    yield make
    for job in jobs:
        job.close()


def test_a_job_starts_ray_on_each_node_and_drains(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.start()
    assert job.lines("awaited") == ["2"]
    steps = job.lines("srun")
    assert [step.split()[:2] for step in steps] == [["0", "3"], ["1", "3"]]
    assert all("--no-kill" in step and "--nodes=1" in step for step in steps)
    assert ["--nodelist=n1" in steps[0], "--nodelist=n2" in steps[1]] == [True, True]
    head, worker = job.lines("ray")
    assert "--head" in head
    assert "--num-cpus=3" in head
    assert f"--address=10.0.0.1:{20000 + int(job.id) % 10000}" in worker
    assert f"serve --set router.host=10.0.0.1 --endpoint-file {job.endpoint} --config s.yaml" in job.lines("serve")[0]
    assert all("--labels=component=0" in line for line in (head, worker))
    job.until(job.endpoint.exists, "the endpoint file is there")
    assert len((job.records / "token").read_text()) == 64
    job.drain()
    assert job.wait() == 0
    assert job.lines("scancel") == [f"--signal=TERM {job.id}"]
    assert not job.private.exists()
    assert "has left" not in job.said()
    assert not job.endpoint.exists()


def test_a_lost_node_ends_nothing(make_job: Callable[..., Job]) -> None:
    job = make_job(SLURM_JOB_NODELIST="n1,n2,n3")
    job.start()
    job.lose("n2")
    job.until(lambda: "node n2 has left; the service continues without it" in job.said(), "the loss is reported")
    job.lose("n3")
    job.until(lambda: "node n3 has left" in job.said(), "the loss is reported")
    assert (job.records / "serve").exists()
    job.drain()
    assert job.wait() == 0


def test_without_its_first_node_the_job_ends(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.start()
    job.lose("n1")
    assert job.wait() == 128 + signal.SIGKILL
    assert not job.private.exists()


def test_a_job_that_is_queued_anew_starts_afresh(make_job: Callable[..., Job]) -> None:
    job = make_job(SLURM_RESTART_COUNT="1")
    job.private.mkdir()
    (job.private / "token").write_text("that of the first run")
    stale = Path(f"/tmp/tw-{os.getuid()}-{job.id}-0")
    stale.mkdir()
    (stale / "session").write_text("of the first run")
    job.start()
    assert len((job.records / "token").read_text()) == 64
    assert not (stale / "session").exists()
    job.drain()
    assert job.wait() == 0
    assert not job.private.exists()


def test_a_heterogeneous_job_serves_over_all_components(make_job: Callable[..., Job]) -> None:
    job = make_job(
        SLURM_HET_SIZE="2",
        SLURM_JOB_ID_HET_GROUP_0="71",
        SLURM_JOB_ID_HET_GROUP_1="72",
        SLURM_JOB_NODELIST_HET_GROUP_0="n1",
        SLURM_JOB_NODELIST_HET_GROUP_1="g1,g2",
        SLURM_CPUS_PER_TASK_HET_GROUP_0="2",
        SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1="8(x2)",
    )
    job.start()
    assert job.lines("awaited") == ["3"]
    steps = job.lines("srun")
    assert [step.split()[:2] for step in steps] == [["0", "2"], ["1", "8"], ["2", "8"]]
    groups = ["--het-group=0", "--het-group=1", "--het-group=1"]
    assert all(group in step for group, step in zip(groups, steps, strict=True))
    ray = job.lines("ray")
    assert ["--head" in line for line in ray] == [True, False, False]
    assert [f"--labels=component={group}" in line for group, line in zip("011", ray, strict=True)] == [True] * 3
    job.drain()
    assert job.wait() == 0
    assert job.lines("scancel") == ["--signal=TERM 71", "--signal=TERM 72"]


def test_a_batch_with_lines_left_is_queued_anew(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.start("batch", "--input", "i", "--output", "o")
    assert job.lines("batch") == ["-m tensorweave.cli.main batch --input i --output o"]
    job.drain()
    assert job.wait() == 3
    assert job.lines("requeue") == [job.id]
    assert not job.private.exists()


def test_a_batch_is_not_queued_anew_for_ever(make_job: Callable[..., Job]) -> None:
    job = make_job(SLURM_RESTART_COUNT="2", TENSORWEAVE_MAX_REQUEUES="2")
    job.start("batch", "--input", "i", "--output", "o")
    job.drain()
    assert job.wait() == 3
    assert not (job.records / "requeue").exists()
    assert "not queued anew: that has happened 2 times" in job.said()


def test_a_batch_whose_head_is_lost_is_queued_anew(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.start("batch", "--input", "i", "--output", "o")
    job.lose("n1")
    assert job.wait() == 128 + signal.SIGKILL
    assert job.lines("requeue") == [job.id]


def test_a_load_runs_once_on_a_service_of_its_own(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.start("bench", "s.yaml", "--concurrency", "4")
    assert job.wait() == 5
    assert job.lines("bench") == ["-m tensorweave.cli.main bench serve --url http://10.0.0.1:8000 --concurrency 4"]
    assert "serve --config s.yaml --set router.host=10.0.0.1 --endpoint-file" in job.lines("serve")[0]
    assert job.lines("scancel") == [f"--signal=TERM {job.id}"]
    assert not job.private.exists()


def test_ray_that_has_not_started_in_its_time_is_started_again(make_job: Callable[..., Job]) -> None:
    job = make_job(RAY_FAILS_ON="1")
    job.start()
    assert job.said().count("Ray has not started here (try 1 of 3)") == 1
    assert len(job.lines("ray")) == 2
    job.drain()
    assert job.wait() == 0


def test_ray_that_ends_after_its_start_is_not_started_again(make_job: Callable[..., Job]) -> None:
    """However short it ran: without its head it would be tried for minutes before Slurm is asked for the first node."""
    job = make_job(RAY_ENDS_ON="1")
    job.start()
    job.until(lambda: "node n2 has left" in job.said(), "the node's script has ended")
    assert job.lines("orphans") == ["1"]
    assert len(job.lines("ray")) == 2
    assert "Ray has not started here" not in job.said()
    job.drain()
    assert job.wait() == 0
