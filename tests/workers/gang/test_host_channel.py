"""Agreements between ranks of one host: messages of all sizes, a rank that ends, one that is silent, strangers."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorweave.cluster.errors import WorkerLost
from tensorweave.workers.gang import host_channel
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.host_channel import HostChannel, open_host_channel
from tests.workers.engine_drive import ThreadComm, run_ranks
from tests.workers.waiting import WAIT_S

MESSAGES = [b"", b"x", bytes(range(256)) * 15, bytes(1 << 20)]


def open_channel(comm: Comm) -> HostChannel:
    channel = open_host_channel(comm, WAIT_S)
    assert channel is not None
    return channel


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_hears_what_rank_0_says(size: int) -> None:
    def work(comm: Comm) -> list[bytes]:
        channel = open_channel(comm)
        if comm.rank == 0:
            for message in MESSAGES:
                channel.send(message)
            return MESSAGES
        return [channel.receive() for _ in MESSAGES]

    assert run_ranks(size, work) == [MESSAGES] * size


@pytest.mark.parametrize("ends", [0, 1])
def test_a_rank_that_ends_is_noticed_at_once(ends: int) -> None:
    def work(comm: Comm) -> str:
        channel = open_channel(comm)
        if comm.rank == ends:
            channel.close()
            return ""
        try:
            while comm.rank == 0:
                channel.send(b"step")
            channel.receive()
        except WorkerLost as error:
            return error.message
        return "nothing"

    told = run_ranks(2, work)[1 - ends]
    assert f"rank {ends} is gone or silent" in told


def test_a_silent_rank_is_lost_in_time() -> None:
    def work(comm: Comm) -> str:
        channel = open_channel(comm)
        channel.set_timeout(0.2)
        if comm.rank == 0:
            comm.agree_min(0)
            return ""
        with pytest.raises(WorkerLost) as caught:
            channel.receive()
        comm.agree_min(0)
        return caught.value.message

    assert "rank 0 is gone or silent (timed out)" in run_ranks(2, work)[1]


def test_ranks_of_several_hosts_have_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_channel, "_share_host", _share_host_with_nobody)
    assert run_ranks(2, lambda comm: open_host_channel(comm, WAIT_S)) == [None, None]


def _share_host_with_nobody(comm: Comm) -> bool:
    return bool(comm.agree_min(int(comm.rank == 0)))


class _Telling(ThreadComm):
    """Rank 0 of two, which tells its secret and name to a stranger first."""

    told: bytes = b""
    calls: Any = None

    def agree(self, data: bytes | None) -> bytes:
        if data is not None and b"tensorweave-" in data:
            self.calls(data)
        return super().agree(data)


def test_a_stranger_without_the_secret_is_sent_away() -> None:
    shared: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    strangers: list[socket.socket] = []

    def call(told: bytes) -> None:
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect(told[16:])
        stranger.sendall(bytes(20))
        strangers.append(stranger)

    leader = _Telling(0, shared, barrier)
    leader.calls = call
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(open_channel, leader)
        theirs = pool.submit(open_channel, ThreadComm(1, shared, barrier))
        ours.result(WAIT_S).send(b"hello")
        assert theirs.result(WAIT_S).receive() == b"hello"
    (stranger,) = strangers
    stranger.settimeout(WAIT_S)
    assert stranger.recv(1) == b""
