"""When a job that has lost its first node is requeued."""

from __future__ import annotations

import runpy
import socket
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "slurm" / "requeue_orphan.py"))
LOST = {"JobState": "RUNNING", "Restarts": "0", "NodeList": "n2,n3"}


@pytest.mark.parametrize(
    ("fields", "is_orphan"),
    [
        (LOST, True),
        ({**LOST, "NodeList": "n1,n2"}, False),
        ({**LOST, "NodeList": ""}, False),
        ({**LOST, "Restarts": "1"}, False),
        ({**LOST, "JobState": "PENDING"}, False),
        ({}, False),
    ],
    ids=["first node lost", "first node there", "no nodes", "restarted", "requeued already", "Slurm is silent"],
)
def test_an_orphan_is_a_running_job_without_its_first_node(fields: dict[str, str], is_orphan: bool) -> None:
    assert SCRIPT["is_orphan"](fields, "n1", 0) is is_orphan


def test_the_wait_for_slurms_word_has_an_end() -> None:
    now_s = 0.0

    def sleep(interval_s: float) -> None:
        nonlocal now_s
        now_s += interval_s

    assert not SCRIPT["await_loss"](lambda: False, 60.0, sleep, lambda: now_s)
    assert 60.0 < now_s < 70.0
    assert SCRIPT["await_loss"](lambda: now_s > 100.0, 60.0, sleep, lambda: now_s)


def test_a_head_that_is_up_leaves_the_job_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        assert SCRIPT["is_up"](address)
    with socket.socket() as deaf:  # nobody else listens at its port either
        deaf.bind(("127.0.0.1", 0))
        assert not SCRIPT["is_up"](deaf.getsockname())
