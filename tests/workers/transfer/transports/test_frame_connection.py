"""`FrameConnection`: when a connection is broken, and when its peer is silent."""

from __future__ import annotations

import socket

import pytest

from tensorweave.cluster.errors import TransferFailed
from tensorweave.workers.transfer.transports.frame_connection import FrameConnection, _move_bytes
from tests.workers.waiting import wait_until


def test_a_connection_reports_that_it_is_broken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = FrameConnection(socket.create_connection(listener.getsockname()))
        peer, _ = listener.accept()
    peer.sendall(b"unread")
    assert not connection.is_broken()
    peer.close()
    wait_until(connection.is_broken)
    connection.close()
    assert connection.is_broken()


def test_only_successive_waits_without_data_are_silence() -> None:
    """After a pause of this process a wait has timed out, but the data that arrived meanwhile is read."""
    waits = iter([BlockingIOError, BlockingIOError, 4, BlockingIOError, BlockingIOError, BlockingIOError])

    def move() -> int:
        outcome = next(waits)
        if isinstance(outcome, int):
            return outcome
        raise outcome

    assert _move_bytes(move, "the peer is silent") == 4
    with pytest.raises(TransferFailed, match="the peer is silent"):
        _move_bytes(move, "the peer is silent")
    assert next(waits, None) is None


def test_a_frame_is_sent_at_once_only_where_nothing_must_be_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = FrameConnection(socket.create_connection(listener.getsockname()))
        peer = FrameConnection(listener.accept()[0])
    assert connection.send_now("claim", 1)
    assert peer.receive() == (["claim", 1], 0)
    assert not connection.send_now("claim", "x" * 5000)
    connection.send("held", is_held=True)
    assert not connection.send_now("claim", 2)
    connection.send("alive")
    assert [peer.receive()[0] for _ in range(2)] == [["held"], ["alive"]]
    num_sent = 0
    while connection.send_now("claim", num_sent, "x" * 4000):  # until the peer must read
        num_sent += 1
    peer.accept_bodies(0)
    assert [peer.receive()[0][1] for _ in range(num_sent)] == list(range(num_sent))
    connection.close()
    assert not connection.send_now("claim", 3)
    peer.close()
