"""Requeue a job that has lost its first node, and with it the batch script; runs on another node when its Ray ends.

With `--no-kill`, which lets a job outlive a lost node, Slurm removes the first node from the job like any other: the
job stays RUNNING without a service. The job is requeued only if Slurm reports this: a node that has merely lost its
connection to the first one must not end a service that is still running.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 900.0
"""SlurmdTimeout, after which Slurm takes a silent node for lost, is 300 s by default."""
CHECK_INTERVAL_S = 5.0
CALL_TIMEOUT_S = 30.0


def main(environment: dict[str, str]) -> int:
    job, first = environment["TENSORWEAVE_JOB"], environment["TENSORWEAVE_FIRST_NODE"]
    num_restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    address = (environment["TENSORWEAVE_HEAD"], int(environment["TENSORWEAVE_GCS_PORT"]))
    if is_up(address) or not await_loss(lambda: is_orphan(describe(job), first, num_restarts), TIMEOUT_S, time.sleep):
        return 1
    note(describe(job).get("StdOut", ""), f"job {job} has lost its first node, {first}: requeueing it")
    return subprocess.run(["scontrol", "requeue", job], timeout=CALL_TIMEOUT_S).returncode


def is_up(address: tuple[str, int]) -> bool:
    """Whether the head of Ray is running; then only this node's Ray has ended."""
    try:
        socket.create_connection(address, timeout=5.0).close()
    except OSError:
        return False
    return True


def await_loss(
    is_lost: Callable[[], bool],
    timeout_s: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    end_s = clock() + timeout_s
    while not is_lost():
        if clock() > end_s:
            return False
        sleep(CHECK_INTERVAL_S)
    return True


def describe(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; none if Slurm does not answer. The hosts of NodeList are expanded."""
    shown = call("scontrol", "show", "job", "--oneliner", job)
    fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", shown))
    if "NodeList" in fields:
        fields["NodeList"] = ",".join(call("scontrol", "show", "hostnames", fields["NodeList"]).split())
    return fields


def is_orphan(fields: dict[str, str], first: str, num_restarts: int) -> bool:
    """Whether the job is running, without a restart since, on nodes that do not include its first one."""
    return (
        fields.get("JobState") == "RUNNING"
        and int(fields.get("Restarts", "-1")) == num_restarts
        and bool(fields.get("NodeList"))
        and first not in fields["NodeList"].split(",")
    )


def note(log: str, line: str) -> None:
    """Write to the job's log, because the output of this step was sent to the first node."""
    try:
        with Path(log).open("a", encoding="utf-8") as file:
            print(line, file=file)
    except OSError as error:
        print(f"{line} (not in its log: {error})", file=sys.stderr)


def call(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT_S).stdout
    except subprocess.TimeoutExpired:
        return ""


if __name__ == "__main__":
    sys.exit(main(dict(os.environ)))
