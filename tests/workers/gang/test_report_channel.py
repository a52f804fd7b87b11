"""Every rank's messages reach rank 0, and nobody else's do."""

from __future__ import annotations

import queue
import socket
import threading
import time
from typing import Any

import pytest

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.wire import pack_frame
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.gang.report_channel import (
    FollowerReportChannel,
    LeaderReportChannel,
    ReportChannel,
    open_report_channel,
)
from tests.workers.engine_drive import run_ranks
from tests.workers.waiting import WAIT_S, is_hung_up_after


def test_a_gang_of_one_calls_itself() -> None:
    got: list[Any] = []
    channel = open_report_channel(SoloComm(), "127.0.0.1")
    channel.start(got.append)
    channel.send(["a", 1])
    assert got == [["a", 1]]
    channel.close()


def test_all_ranks_reach_rank_0_in_order() -> None:
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done = threading.Barrier(3)

    def work(comm: Comm) -> None:
        channel: ReportChannel = open_report_channel(comm, "127.0.0.1")
        channel.start(got.put)
        for i in range(50):
            channel.send([comm.rank, i])
        done.wait(WAIT_S)
        if comm.rank == 0:
            messages = [got.get(timeout=WAIT_S) for _ in range(150)]
            for rank in range(3):
                assert [i for r, i in messages if r == rank] == list(range(50))
        done.wait(WAIT_S)
        channel.close()

    run_ranks(3, work)


def test_a_peer_without_the_secret_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    got: list[Any] = []
    leader = LeaderReportChannel("127.0.0.1", "secret")
    leader.start(got.append)
    for noise in (
        pack_frame("report", [1]),
        pack_frame("hello", "guess"),
        pack_frame("hello", "geheimnü"),
        b"GET / HTTP/1.0\r\n\r\n" * 1000,
    ):
        assert is_hung_up_after(noise, leader.address)
    assert got == []
    assert len([record for record in caplog.records if "report channel" in record.getMessage()]) == 1, (
        "the others are counted"
    )
    leader.close()


def send_on(channel: ReportChannel) -> None:
    """Until it raises: the first messages after the end may still be taken by the system."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        channel.send(["still here"])
        time.sleep(0.001)


def test_a_lost_rank_0_is_noticed() -> None:
    leader = LeaderReportChannel("127.0.0.1", "secret")
    leader.start(lambda message: None)
    follower = FollowerReportChannel(leader.address, "secret")
    follower.send(["here"])
    leader.close()
    with pytest.raises(WorkerLost, match="rank 0"):
        send_on(follower)
    follower.close()
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and does not listen: a port that was closed may be another process's by now
        with pytest.raises(WorkerLost, match="cannot be reached"):
            FollowerReportChannel(unheard.getsockname(), "secret")
