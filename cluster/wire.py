"""Frames on our own sockets: a little-endian u32 length, then a msgpack array whose first element is the frame's name.

Links (the clients) and leaders (the servers) communicate through this file only. A frame that is too long, malformed or
not an array raises `WireError`, and its reader closes the connection. Nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final, Self, TypeAlias

import msgpack

from tensorweave.cluster.errors import NotReady, WireError, error_from_wire
from tensorweave.cluster.protocol import PROTOCOL_VERSION, ModelInfo

Frame: TypeAlias = list[Any]

MAX_FRAME_BYTES: Final = 64 << 20
MAX_HELLO_BYTES: Final = 4 << 10
"""Limit for a frame of a peer that has not authenticated itself."""
MAX_RECORDS: Final = 256
"""Statistics or KV events in one frame; a longer answer takes several."""
READ_BYTES: Final = 256 << 10
PING_INTERVAL_S: Final = 0.5
"""A leader sends at least one frame in this time, so a silent leader is a hung one."""
HELLO_TIMEOUT_S: Final = 5.0

_LENGTH: Final = struct.Struct("<I")
_PEER_LOST_MS: Final = 10_000


def pack_frame(name: str, *fields: Any) -> bytes:
    payload: bytes = msgpack.packb([name, *fields])
    if len(payload) > MAX_FRAME_BYTES:
        raise WireError(f"{name!r} frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} of {len(data)} bytes")


def unpack_payload(payload: bytes | bytearray | memoryview) -> Frame:
    try:
        frame = msgpack.unpackb(payload, raw=False, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"malformed frame: {error}") from None
    if not isinstance(frame, list) or not frame or not isinstance(frame[0], str):
        raise WireError("a frame is an array that starts with its name")
    return frame


class FrameDecoder:
    """Splits received bytes into frames. `max_frame_bytes` may be raised once the peer is authenticated."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that `data` completes. A limit that is changed between two frames applies to the second."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > self.max_frame_bytes:
                    raise WireError(f"a frame of {length} bytes is over the limit of {self.max_frame_bytes}")
                end = start + _LENGTH.size + length
                if len(buffer) < end:
                    break
                payload = bytes(buffer[start + _LENGTH.size : end])
                start = end
                yield unpack_payload(payload)
        finally:
            del buffer[:start]


class FrameReader:
    """Iterates over the frames of one connection, until the peer closes it or it breaks."""

    def __init__(self, stream: asyncio.StreamReader, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.decoder = FrameDecoder(max_frame_bytes)
        self._stream = stream
        self._frames: Iterator[Frame] = iter(())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        while (frame := next(self._frames, None)) is None:
            try:
                data = await self._stream.read(READ_BYTES)
            except OSError:
                data = b""
            if not data:
                raise StopAsyncIteration
            self._frames = self.decoder.feed(data)
        return frame


def send_hello(writer: asyncio.StreamWriter, secret: str) -> None:
    writer.write(pack_frame("hello", PROTOCOL_VERSION, secret))


def check_hello(frame: Frame, secret: str) -> None:
    """For leaders. Raises WireError if the protocol or the secret is wrong."""
    if frame[0] != "hello" or len(frame) != 3:
        raise WireError("the first frame must be hello")
    _, version, offered = frame
    if version != PROTOCOL_VERSION:
        raise WireError(f"protocol version {version!r}, here it is {PROTOCOL_VERSION}")
    if not isinstance(offered, str) or not hmac.compare_digest(offered.encode(), secret.encode()):
        raise WireError("wrong secret")


async def read_hello(frames: FrameReader) -> ModelInfo:
    """The leader's hello. Raises WireError, NotReady, or the error that the leader sent instead."""
    async for frame in frames:
        match frame:
            case ["hello", version, fields] if version == PROTOCOL_VERSION:
                return ModelInfo.from_wire(fields)
            case ["error", fields] if isinstance(fields, dict):
                raise error_from_wire(fields)
            case ["hello", version, _]:
                raise WireError(f"the leader speaks protocol {version!r}, here it is {PROTOCOL_VERSION}")
            case _:
                raise WireError(f"{frame[0]!r} frame in place of a hello")
    raise NotReady("the leader closed the connection before its hello")


def tune_socket(writer: asyncio.StreamWriter) -> None:
    """Send without Nagle's delay, and detect a lost host within about 10 s."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _PEER_LOST_MS)


def unsent_bytes(writer: asyncio.StreamWriter) -> int:
    """Bytes that wait to be sent, beyond the kernel's own buffer."""
    return int(writer.transport.get_write_buffer_size())


def abort(writer: asyncio.StreamWriter) -> None:
    """Close now, and discard what was not sent."""
    writer.transport.abort()
