"""`ReportChannel`: how the ranks of a gang send messages to rank 0 outside the step loop.

Each rank but 0 has a TCP connection to rank 0, which carries msgpack frames; rank 0's address and the secret reach the
others through an agreement while the gang is built. Rank 0 passes messages to its handler on one reader thread per
connection, and its own messages directly.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

import msgpack

from tensorweave.cluster.errors import WireError, WorkerLost
from tensorweave.cluster.limited_log import LimitedLog
from tensorweave.cluster.wire import MAX_HELLO_BYTES, FrameDecoder, pack_frame
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.listener import GuardedListener, close_socket

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Any], None]

SEND_TIMEOUT_S: Final = 5.0
_READ_BYTES: Final = 64 << 10


class ReportChannel(Protocol):
    def start(self, handle: Handler) -> None:
        """Pass all messages to rank 0's `handle`, on any thread; that of the other ranks is not called."""

    def send(self, message: Any) -> None:
        """From any thread. Raises WorkerLost if rank 0 is gone."""

    def close(self) -> None: ...


class LocalReportChannel:
    """A rank to itself: `send` calls the handler."""

    def start(self, handle: Handler) -> None:
        self._handle = handle

    def send(self, message: Any) -> None:
        self._handle(message)

    def close(self) -> None:
        return None


class LeaderReportChannel(LocalReportChannel):
    """Rank 0: reads each follower that has sent the secret, on a thread per connection."""

    def __init__(self, host: str, secret: str) -> None:
        self._secret = secret.encode()
        self._listener = GuardedListener(host, "report-accept", self._admit)
        self.address = self._listener.address
        self._log = LimitedLog(logger, logging.WARNING)
        self._lock = threading.Lock()
        self._socks: set[socket.socket] = set()
        self._is_closing = False

    def start(self, handle: Handler) -> None:
        super().start(handle)
        self._listener.start()

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            socks = list(self._socks)
        for sock in socks:
            close_socket(sock)
        self._listener.close(SEND_TIMEOUT_S)

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            self._socks.add(sock)
            if self._is_closing:
                close_socket(sock)
        threading.Thread(target=self._read, args=(sock,), name="report-reader", daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        decoder = FrameDecoder(MAX_HELLO_BYTES)
        is_trusted = False
        try:
            while data := sock.recv(_READ_BYTES):
                for name, message in decoder.feed(data):
                    if is_trusted:
                        self._handle(message)
                        continue
                    self._check(name, message)
                    is_trusted = True
                    self._listener.trust(sock)
        except (OSError, ValueError, WireError) as error:
            self._log_end(f"a rank's report channel ends: {error}", is_trusted)
        finally:
            self._listener.trust(sock)
            with self._lock:
                self._socks.discard(sock)
            close_socket(sock)

    def _check(self, name: str, offered: Any) -> None:
        if name != "hello" or not hmac.compare_digest(str(offered).encode(), self._secret):
            raise WireError("wrong secret")

    def _log_end(self, message: str, is_trusted: bool) -> None:
        if self._is_closing:
            return
        if is_trusted:
            logger.warning("%s", message)
        else:
            self._log.write(message)


class FollowerReportChannel:
    """Any other rank."""

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        self._lock = threading.Lock()
        try:
            self._sock = socket.create_connection(address, timeout=SEND_TIMEOUT_S)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.sendall(pack_frame("hello", secret))
        except OSError as error:
            raise WorkerLost(f"rank 0's report channel cannot be reached: {error}") from error

    def start(self, handle: Handler) -> None:
        return None

    def send(self, message: Any) -> None:
        try:
            with self._lock:
                self._sock.sendall(pack_frame("report", message))
        except OSError as error:
            raise WorkerLost(f"rank 0's report channel is broken: {error}") from error

    def close(self) -> None:
        close_socket(self._sock)


def open_report_channel(comm: Comm, host: str) -> ReportChannel:
    """Every rank calls it at the same point. `host` is the address of its host that the other ranks can reach."""
    if comm.size == 1:
        return LocalReportChannel()
    if comm.rank == 0:
        secret = secrets.token_hex(16)
        leader = LeaderReportChannel(host, secret)
        comm.agree(msgpack.packb([*leader.address, secret]))
        return leader
    leader_host, port, secret = msgpack.unpackb(comm.agree(None))
    return FollowerReportChannel((leader_host, port), secret)
