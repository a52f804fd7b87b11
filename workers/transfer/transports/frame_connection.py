"""`FrameConnection`: frames over one TCP connection between two ranks. Any thread may send, one receives.

    ┌──────────────┬───────────────┬───────────────────────┬─────────────┐
    │ u32 head len │ u32 body len  │ head: msgpack [name…] │ body: bytes │   little-endian
    └──────────────┴───────────────┴───────────────────────┴─────────────┘

A peer sends something every second, so its silence breaks the connection. Silence is counted in waits without data
rather than in seconds, so that a pause of this process is not taken for a silent peer. Every fault of the connection
raises `TransferFailed`, every violation of the protocol `WireError`; the connection is unusable after either.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.cluster.wire import MAX_HELLO_BYTES, Frame, unpack_payload
from tensorweave.workers.transfer.transports.peer_sockets import ByteSocket

ALIVE_INTERVAL_S: Final = 1.0
SILENCE_S: Final = 3.0
MAX_HEAD_BYTES: Final = 4 << 20

_NUM_WAITS: Final = 3
"""The peer is silent after this many successive waits without data."""
_SIZES: Final = struct.Struct("<II")
_TIMEVAL: Final = struct.Struct("@ll")
_MAX_PIECES: Final = 1024
_MAX_UNQUEUED_BYTES: Final = 4 << 10
"""A socket that can be written takes as much at once."""
_READ_AHEAD_BYTES: Final = 16 << 10
"""Heads and small bodies are read together with what follows them."""


class FrameConnection:
    """The socket blocks, with the system's own timeouts: one call reads a whole body, and one call sends it."""

    def __init__(self, sock: socket.socket, stream: ByteSocket | None = None, silence_s: float = SILENCE_S) -> None:
        """`stream` is how the bytes travel over `sock`; None: as they are."""
        self.max_head_bytes = MAX_HELLO_BYTES
        self.max_body_bytes = 0
        self._sock = sock
        self._stream: ByteSocket = sock if stream is None else stream
        self._sending = threading.Lock()
        self._held: list[memoryview] = []
        self._read_ahead = memoryview(bytearray(_READ_AHEAD_BYTES))
        self._unread = self._read_ahead[:0]
        sock.setblocking(True)
        wait_s = silence_s / _NUM_WAITS
        limit = _TIMEVAL.pack(int(wait_s), int(wait_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def accept_bodies(self, max_body_bytes: int) -> None:
        """The peer has authenticated itself: accept long heads, and bodies up to this size."""
        self.max_head_bytes, self.max_body_bytes = MAX_HEAD_BYTES, max_body_bytes

    def send(
        self, name: str, *fields: Any, body: Sequence[memoryview] | memoryview | bytes = b"", is_held: bool = False
    ) -> None:
        """Send a frame; its body may be in several pieces. A held frame is sent with the next one, and its body must
        not change until then."""
        head: bytes = msgpack.packb([name, *fields])
        pieces = [memoryview(body)] if isinstance(body, bytes | memoryview) else list(body)
        with self._sending:
            self._held += [memoryview(_SIZES.pack(len(head), sum(map(len, pieces))) + head), *pieces]
            if not is_held:
                held, self._held = self._held, []
                self._send_all(held)

    def send_now(self, name: str, *fields: Any) -> bool:
        """Send a frame without a body if that takes no wait; return whether it was sent."""
        head: bytes = msgpack.packb([name, *fields])
        if len(head) > _MAX_UNQUEUED_BYTES or not self._sending.acquire(blocking=False):
            return False
        try:
            if self._held or not self._poll(select.POLLOUT) & select.POLLOUT:
                return False
            self._send_all([memoryview(_SIZES.pack(len(head), 0) + head)])
            return True
        finally:
            self._sending.release()

    def receive(self) -> tuple[Frame, int]:
        """Return the next frame's head and the length of its body. Read the body with `receive_into` before the next
        call."""
        head_bytes, body_bytes = _SIZES.unpack(self._take(_SIZES.size))
        if head_bytes > self.max_head_bytes or body_bytes > self.max_body_bytes:
            raise WireError(f"a frame of {head_bytes} + {body_bytes} bytes is over the limit")
        return unpack_payload(self._take(head_bytes)), body_bytes

    def receive_into(self, view: memoryview) -> None:
        """Fill `view`."""
        num_here = min(len(view), len(self._unread))
        view[:num_here] = self._unread[:num_here]
        self._unread = self._unread[num_here:]
        view = view[num_here:]
        while len(view):
            view = view[self._read(view, socket.MSG_WAITALL) :]

    def _take(self, num_bytes: int) -> bytearray:
        """The next bytes, from the read-ahead buffer, which is refilled if it is empty."""
        data = bytearray(num_bytes)
        view = memoryview(data)
        while len(view):
            if not self._unread:
                self._unread = self._read_ahead[: self._read(self._read_ahead)]
            num_here = min(len(view), len(self._unread))
            view[:num_here] = self._unread[:num_here]
            view, self._unread = view[num_here:], self._unread[num_here:]
        return data

    def _read(self, view: memoryview, flags: int = 0) -> int:
        count = _move_bytes(lambda: self._stream.recv_into(view, 0, flags), "the peer is silent")
        if not count:
            raise TransferFailed("the peer has closed the connection")
        return count

    def is_broken(self) -> bool:
        """Whether the connection was closed, by the peer or here. May be called on any thread; reads nothing."""
        return self._sock.fileno() < 0 or bool(self._poll(select.POLLRDHUP))

    def close(self) -> None:
        """May be called on any thread: pending sends and receives fail."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _poll(self, event: int) -> int:
        """Which of this event and the socket's faults are there; nothing if it has been closed here."""
        descriptor = self._sock.fileno()
        if descriptor < 0:
            return 0
        poll = select.poll()
        poll.register(descriptor, event)
        return next((found for _, found in poll.poll(0)), 0)

    def _send_all(self, pieces: list[memoryview]) -> None:
        while pieces:
            batch = pieces[:_MAX_PIECES]
            count = _move_bytes(functools.partial(self._stream.sendmsg, batch), "the peer does not read")
            num_sent = 0
            while num_sent < len(pieces) and count >= len(pieces[num_sent]):
                count -= len(pieces[num_sent])
                num_sent += 1
            pieces = pieces[num_sent:]
            if count:
                pieces[0] = pieces[0][count:]


def _move_bytes(move: Callable[[], int], complaint: str) -> int:
    """Call `move` until it moves bytes; return their number."""
    for _ in range(_NUM_WAITS):
        try:
            return move()
        except BlockingIOError:
            continue
        except OSError as error:
            raise TransferFailed(f"the connection broke: {error}") from None
    raise TransferFailed(f"the connection broke: {complaint}")
