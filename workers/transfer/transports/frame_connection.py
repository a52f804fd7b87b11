"""`Stream`: frames over one TCP connection between two ranks. Any thread may send, one receives.

    ┌──────────────┬───────────────┬───────────────────────┬─────────────┐
    │ u32 head len │ u32 body len  │ head: msgpack [name…] │ body: bytes │   little-endian
    └──────────────┴───────────────┴───────────────────────┴─────────────┘

Silence breaks it: a peer sends something each second. It is counted in waits that bring nothing rather than in seconds:
if this process stood still, the peer is not to blame. Every fault of a connection surfaces as `TransferFailed`, and
what is not of our protocol as `WireError`; the stream is of no use after either.
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
import numpy as np
import numpy.typing as npt
from torch import Tensor

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.cluster.wire import MAX_HELLO_BYTES, Frame, unpack_payload

ALIVE_INTERVAL_S: Final = 1.0
SILENCE_S: Final = 3.0
MAX_HEAD_BYTES: Final = 4 << 20

_NUM_WAITS: Final = 3
"""In vain, one after the other: then the peer is silent."""
_SIZES: Final = struct.Struct("<II")
_TIMEVAL: Final = struct.Struct("@ll")
_MAX_PIECES: Final = 1024
_READ_AHEAD_BYTES: Final = 16 << 10
"""Heads and small bodies come in one read with what follows them."""


class Stream:
    """The socket blocks, with the system's own time limits: a read fills a whole body in one call, a send takes one."""

    def __init__(self, sock: socket.socket, silence_s: float = SILENCE_S) -> None:
        self.max_head_bytes = MAX_HELLO_BYTES
        self.max_body_bytes = 0
        self._sock = sock
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

    def trust(self, max_body_bytes: int) -> None:
        """The peer has shown who it is: it may send long heads, and bodies up to this size."""
        self.max_head_bytes, self.max_body_bytes = MAX_HEAD_BYTES, max_body_bytes

    def send(
        self, name: str, *fields: Any, body: Sequence[memoryview] | memoryview | bytes = b"", is_held: bool = False
    ) -> None:
        """A body may be in several pieces. Held, the frame goes with the next one; its body must stay as it is until
        then."""
        head: bytes = msgpack.packb([name, *fields])
        pieces = [memoryview(body)] if isinstance(body, bytes | memoryview) else list(body)
        with self._sending:
            self._held += [memoryview(_SIZES.pack(len(head), sum(map(len, pieces))) + head), *pieces]
            if not is_held:
                held, self._held = self._held, []
                self._send_all(held)

    def receive(self) -> tuple[Frame, int]:
        """The next frame's head, and the length of its body, which must be taken with `receive_into` before the next
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
        """The next bytes; where they are not here yet, with whatever follows them."""
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
        count = _call(lambda: self._sock.recv_into(view, 0, flags), "the peer is silent")
        if not count:
            raise TransferFailed("the peer has closed the connection")
        return count

    def is_broken(self) -> bool:
        """Whether the peer has closed it, or died, or it was closed here. From any thread; reads nothing."""
        descriptor = self._sock.fileno()
        if descriptor < 0:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Any thread: whoever sends or receives fails."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _send_all(self, pieces: list[memoryview]) -> None:
        while pieces:
            batch = pieces[:_MAX_PIECES]
            count = _call(functools.partial(self._sock.sendmsg, batch), "the peer takes nothing")
            num_sent = 0
            while num_sent < len(pieces) and count >= len(pieces[num_sent]):
                count -= len(pieces[num_sent])
                num_sent += 1
            pieces = pieces[num_sent:]
            if count:
                pieces[0] = pieces[0][count:]


def _call(move: Callable[[], int], complaint: str) -> int:
    """How many bytes it moved, in the first wait that brought any."""
    for _ in range(_NUM_WAITS):
        try:
            return move()
        except BlockingIOError:
            continue
        except OSError as error:
            raise TransferFailed(f"the connection broke: {error}") from None
    raise TransferFailed(f"the connection broke: {complaint}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a host tensor of bytes."""
    array: npt.NDArray[np.uint8] = tensor.numpy()
    return array.data
