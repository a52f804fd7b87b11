"""`Uplink`: how the ranks of a gang report to rank 0 out of step: each a TCP connection of msgpack frames.

Rank 0 listens, its address reaches the others through an agreement when the gang is built. What a rank sends is handed
to rank 0's handler on a reader thread; rank 0's own messages go there directly, and a gang of one needs nothing else.
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
from tensorweave.workers.gang.door import Door, hang_up

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Any], None]

SEND_TIMEOUT_S: Final = 5.0
_READ_BYTES: Final = 64 << 10


class Uplink(Protocol):
    def start(self, handle: Handler) -> None:
        """From now on rank 0's `handle` gets all messages, on any thread; other ranks' is not called."""

    def send(self, message: Any) -> None:
        """Any thread. Raises WorkerLost where rank 0 is gone."""

    def close(self) -> None: ...


class SoloUplink:
    """A gang of one, or rank 0 to itself: a call."""

    def start(self, handle: Handler) -> None:
        self._handle = handle

    def send(self, message: Any) -> None:
        self._handle(message)

    def close(self) -> None:
        return None


class LeaderUplink(SoloUplink):
    """Rank 0: followers that show the secret are read, each on a thread."""

    def __init__(self, host: str, secret: str) -> None:
        self._secret = secret.encode()
        self._door = Door(host, "uplink-accept", self._admit)
        self.address = self._door.address
        self._log = LimitedLog(logger, logging.WARNING)
        self._lock = threading.Lock()
        self._socks: set[socket.socket] = set()
        self._is_closing = False

    def start(self, handle: Handler) -> None:
        super().start(handle)
        self._door.open()

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            socks = list(self._socks)
        for sock in socks:
            hang_up(sock)
        self._door.close(SEND_TIMEOUT_S)

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            self._socks.add(sock)
            if self._is_closing:
                hang_up(sock)
        threading.Thread(target=self._read, args=(sock,), name="uplink-reader", daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        decoder = FrameDecoder(MAX_HELLO_BYTES)
        is_known = False
        try:
            while data := sock.recv(_READ_BYTES):
                for name, message in decoder.feed(data):
                    if is_known:
                        self._handle(message)
                        continue
                    self._check(name, message)
                    is_known = True
                    self._door.know(sock)
        except (OSError, ValueError, WireError) as error:
            self._tell(f"a rank's uplink ends: {error}", is_known)
        finally:
            self._door.know(sock)
            with self._lock:
                self._socks.discard(sock)
            hang_up(sock)

    def _check(self, name: str, offered: Any) -> None:
        if name != "hello" or not hmac.compare_digest(str(offered).encode(), self._secret):
            raise WireError("wrong secret")

    def _tell(self, message: str, is_known: bool) -> None:
        if self._is_closing:
            return
        if is_known:
            logger.warning("%s", message)
        else:
            self._log.tell(message)


class FollowerUplink:
    """Any other rank."""

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        self._lock = threading.Lock()
        try:
            self._sock = socket.create_connection(address, timeout=SEND_TIMEOUT_S)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.sendall(pack_frame("hello", secret))
        except OSError as error:
            raise WorkerLost(f"rank 0's uplink cannot be reached: {error}") from error

    def start(self, handle: Handler) -> None:
        return None

    def send(self, message: Any) -> None:
        try:
            with self._lock:
                self._sock.sendall(pack_frame("report", message))
        except OSError as error:
            raise WorkerLost(f"rank 0's uplink broke: {error}") from error

    def close(self) -> None:
        hang_up(self._sock)


def join_uplink(comm: Comm, host: str) -> Uplink:
    """Every rank calls it at the same place; `host` is the address of this rank's host that the others reach."""
    if comm.size == 1:
        return SoloUplink()
    if comm.rank == 0:
        secret = secrets.token_hex(16)
        leader = LeaderUplink(host, secret)
        comm.agree(msgpack.packb([*leader.address, secret]))
        return leader
    leader_host, port, secret = msgpack.unpackb(comm.agree(None))
    return FollowerUplink((leader_host, port), secret)
