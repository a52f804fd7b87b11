"""What peers without the secret can hold: few connections, briefly, whatever they send; others still get in."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tensorweave.workers.gang import listener as listener_module
from tensorweave.workers.gang.listener import MAX_UNKNOWN_PEERS, GuardedListener, close_socket
from tests.workers.waiting import WAIT_S, wait_until

SOON_S = 0.3


class Greeter:
    """Reads each connection on a thread; who sends "secret" is trusted and answered."""

    def __init__(self) -> None:
        self.listener = GuardedListener("127.0.0.1", "test-accept", self._admit)
        self.num_threads = 0
        self._lock = threading.Lock()

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            self.num_threads += 1
        threading.Thread(target=self._read, args=(sock,), daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        got = b""
        with contextlib.suppress(ConnectionResetError):  # what comes behind the listener's hanging up is reset
            while data := sock.recv(100):
                got += data
                if got.endswith(b"secret"):
                    self.listener.trust(sock)
                    sock.sendall(b"hello")
        self.listener.trust(sock)
        close_socket(sock)
        with self._lock:
            self.num_threads -= 1


@contextlib.contextmanager
def greeter() -> Iterator[Greeter]:
    one = Greeter()
    one.listener.start()
    try:
        yield one
    finally:
        one.listener.close(WAIT_S)


@pytest.fixture
def calls() -> Iterator[Callable[[Greeter], socket.socket]]:
    socks: list[socket.socket] = []

    def call(to: Greeter) -> socket.socket:
        socks.append(socket.create_connection(to.listener.address, timeout=WAIT_S))
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
    monkeypatch.setattr(listener_module, "_CHECK_INTERVAL_S", SOON_S / 4)
    with greeter() as one:
        slow, known = calls(one), calls(one)
        known.sendall(b"secret")
        assert known.recv(5) == b"hello"
        monkeypatch.setattr(listener_module, "GREETING_TIMEOUT_S", SOON_S)  # the known one has had all its time
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip(slow)
        known.sendall(b"secret")
        assert known.recv(5) == b"hello"
        wait_until(lambda: one.num_threads == 1)


def test_of_many_unknown_peers_the_oldest_are_closed(calls: Callable[[Greeter], socket.socket]) -> None:
    with greeter() as one:
        unknown = [calls(one) for _ in range(MAX_UNKNOWN_PEERS + 40)]
        for peer in unknown[:39]:
            assert peer.recv(1) == b""
        wait_until(lambda: one.num_threads <= MAX_UNKNOWN_PEERS + 1)
        peer = calls(one)
        peer.sendall(b"secret")
        assert peer.recv(5) == b"hello"


def test_it_survives_want_of_descriptors(
    calls: Callable[[Greeter], socket.socket], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "_CHECK_INTERVAL_S", 0.05)
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
