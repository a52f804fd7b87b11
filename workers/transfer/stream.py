"""`Stream`: frames over one TCP connection between two ranks. Any thread may send, one receives.

    ┌──────────────┬───────────────┬───────────────────────┬─────────────┐
    │ u32 head len │ u32 body len  │ head: msgpack [name…] │ body: bytes │   little-endian
    └──────────────┴───────────────┴───────────────────────┴─────────────┘

Silence breaks it: a peer sends something each second. Every fault of a connection surfaces as `TransferFailed`, and
what is not of our protocol as `WireError`; the stream is of no use after either.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
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

_SIZES: Final = struct.Struct("<II")


class Stream:
    def __init__(self, sock: socket.socket, silence_s: float = SILENCE_S) -> None:
        self.max_head_bytes = MAX_HELLO_BYTES
        self.max_body_bytes = 0
        self._sock = sock
        self._sending = threading.Lock()
        self._prefix = bytearray(_SIZES.size)
        sock.settimeout(silence_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def trust(self, max_body_bytes: int) -> None:
        """The peer has shown who it is: it may send long heads, and bodies up to this size."""
        self.max_head_bytes, self.max_body_bytes = MAX_HEAD_BYTES, max_body_bytes

    def send(self, name: str, *fields: Any, body: memoryview | bytes = b"") -> None:
        head: bytes = msgpack.packb([name, *fields])
        with self._sending:
            self._send_all(_SIZES.pack(len(head), len(body)) + head)
            if len(body):
                self._send_all(body)

    def receive(self) -> tuple[Frame, int]:
        """The next frame's head, and the length of its body, which must be taken with `receive_into` before the next
        call."""
        self.receive_into(memoryview(self._prefix))
        head_bytes, body_bytes = _SIZES.unpack(self._prefix)
        if head_bytes > self.max_head_bytes or body_bytes > self.max_body_bytes:
            raise WireError(f"a frame of {head_bytes} + {body_bytes} bytes is over the limit")
        head = bytearray(head_bytes)
        self.receive_into(memoryview(head))
        return unpack_payload(head), body_bytes

    def receive_into(self, view: memoryview) -> None:
        """Fill `view`."""
        while len(view):
            try:
                count = self._sock.recv_into(view)
            except OSError as error:
                raise TransferFailed(f"the connection broke: {error}") from None
            if not count:
                raise TransferFailed("the peer has closed the connection")
            view = view[count:]

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

    def _send_all(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while len(view):
            try:
                view = view[self._sock.send(view) :]
            except OSError as error:
                raise TransferFailed(f"the connection broke: {error}") from None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a host tensor of bytes."""
    array: npt.NDArray[np.uint8] = tensor.numpy()
    return array.data
