"""What strangers can hold at a door: few places, for a short time, whatever they send; peers come in all the while."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tensorweave.workers.gang import door as door_module
from tensorweave.workers.gang.door import MAX_STRANGERS, Door, hang_up
from tests.workers.waiting import WAIT_S, wait_until

SOON_S = 0.3


class Greeter:
    """Reads each connection on a thread; who sends "secret" is known and answered."""

    def __init__(self) -> None:
        self.door = Door("127.0.0.1", "test-accept", self._admit)
        self.num_threads = 0
        self._lock = threading.Lock()

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            self.num_threads += 1
        threading.Thread(target=self._read, args=(sock,), daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        got = b""
        while data := sock.recv(100):
            got += data
            if got.endswith(b"secret"):
                self.door.know(sock)
                sock.sendall(b"hello")
        self.door.know(sock)
        hang_up(sock)
        with self._lock:
            self.num_threads -= 1


@contextmanager
def greeter() -> Iterator[Greeter]:
    one = Greeter()
    one.door.open()
    try:
        yield one
    finally:
        one.door.close(WAIT_S)


@pytest.fixture
def calls() -> Iterator[Callable[[Greeter], socket.socket]]:
    socks: list[socket.socket] = []

    def call(to: Greeter) -> socket.socket:
        socks.append(socket.create_connection(to.door.address, timeout=WAIT_S))
        return socks[-1]

    yield call
    for sock in socks:
        sock.close()


def drip(sock: socket.socket) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        sock.sendall(b"x")
        time.sleep(SOON_S / 10)


def test_one_byte_now_and_then_buys_no_time(
    calls: Callable[[Greeter], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "GREETING_TIMEOUT_S", SOON_S)
    monkeypatch.setattr(door_module, "_LOOK_INTERVAL_S", SOON_S / 4)
    with greeter() as one:
        slow, known = calls(one), calls(one)
        known.sendall(b"secret")
        assert known.recv(5) == b"hello"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip(slow)
        known.sendall(b"secret")
        assert known.recv(5) == b"hello"
        wait_until(lambda: one.num_threads == 1)


def test_of_many_strangers_the_oldest_make_room(calls: Callable[[Greeter], socket.socket]) -> None:
    with greeter() as one:
        strangers = [calls(one) for _ in range(MAX_STRANGERS + 40)]
        for stranger in strangers[:39]:
            assert stranger.recv(1) == b""
        wait_until(lambda: one.num_threads <= MAX_STRANGERS + 1)
        peer = calls(one)
        peer.sendall(b"secret")
        assert peer.recv(5) == b"hello"


def test_a_door_survives_want_of_descriptors(
    calls: Callable[[Greeter], socket.socket], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door_module, "_LOOK_INTERVAL_S", 0.05)
    is_exhausted = threading.Event()
    is_exhausted.set()
    accept = socket.socket.accept

    def accept_if_there_is_room(listener: socket.socket) -> tuple[socket.socket, object]:
        if is_exhausted.is_set():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_if_there_is_room)
    with greeter() as one:
        peer = calls(one)
        peer.sendall(b"secret")
        wait_until(lambda: "no connection can be taken (Too many open files)" in caplog.text)
        is_exhausted.clear()
        assert peer.recv(5) == b"hello"
