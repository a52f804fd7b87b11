"""Limits for HTTP connections without a complete request: uvicorn's protocol, with deadlines. Requests that arrive
together take turns.

uvicorn itself closes only connections that are idle after an answer. One that never sends a request, or only half a
head, it keeps for ever. The deploy room replaces uvicorn's protocol by this one before a server starts.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import uvicorn.config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tensorweave.cluster.file_limit import raise_file_limit
from tensorweave.router.http.arrivals import Arrivals
from tensorweave.router.http.asgi import REQUEST_ID_HEADER, is_request_id


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one server.

    Attributes:
        head_timeout_s: For the first byte of a new connection's head, and from there to the end of each head.
        max_head_bytes: Of one head.
        rest_timeout_s: For the rest of a body that was not needed for the answer.
        stall_timeout_s: A client that acknowledges nothing for so long is gone.
        max_waiting: Connections without a complete first head; one more closes the oldest of them.
    """

    head_timeout_s: float = 10.0
    max_head_bytes: int = 64 << 10
    rest_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    max_waiting: int = 4096
    """More than clients that connect at the same time, before their requests are read."""


_HEAD_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. All of a server share `waiting`, which has those without a complete first head, oldest first, and
    `arrivals`, where a POST waits for its turn before its head is parsed. Other requests are answered from what is
    known, and do not wait behind it."""

    def __init__(
        self,
        limits: ConnectionLimits,
        waiting: dict[BoundedHttpProtocol, None],
        arrivals: Arrivals,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._waiting = waiting
        self._arrivals = arrivals
        self._arrived = bytearray()
        """Of a request that waits for its turn."""
        self._deadline: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.stall_timeout_s * 1e3))
        self._wait_for_head()
        self._start_deadline(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived.clear()
        self._waiting.pop(self, None)
        self._stop_deadline()
        super().connection_lost(exc)

    def give_up(self) -> None:
        self._waiting.pop(self, None)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        is_answered = self.cycle is None or self.cycle.response_complete
        if self._arrived:
            self._hold(data)
        elif is_answered and not self._is_in_head and data.startswith(b"POST "):
            self._hold(data)
            self._arrivals.begin(self._begin)
        else:
            self._read(data, is_answered=is_answered)

    def _hold(self, data: bytes) -> None:
        self._arrived += data
        self._waiting.pop(self, None)
        self._stop_deadline()
        self._unset_keepalive_if_required()
        if len(self._arrived) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def _begin(self) -> None:
        """It is the turn of the request that has arrived, unless the client is gone."""
        if self._arrived:
            data = bytes(self._arrived)
            self._arrived.clear()
            self.flow.resume_reading()
            self._read(data, is_answered=True)
            if self._is_in_head and self.cycle is None:
                self._wait_for_head()

    def _wait_for_head(self) -> None:
        """It is the newest without a complete first head. If they are too many, the oldest is closed."""
        self._waiting[self] = None
        if len(self._waiting) > self._limits.max_waiting:
            next(iter(self._waiting)).give_up()

    def _read(self, data: bytes, *, is_answered: bool) -> None:
        if self._deadline is None and is_answered:
            self._start_deadline(self._limits.rest_timeout_s)
        super().data_received(data)
        if not self._is_in_head:
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > self._limits.max_head_bytes:
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._num_head_bytes = True, 0
        self._start_deadline(self._limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Drop an invalid request id: Serve would return it unchanged, in addition to ours."""
        if name.lower() != REQUEST_ID_HEADER or is_request_id(value):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._waiting.pop(self, None)
        self._stop_deadline()
        super().on_headers_complete()

    def _start_deadline(self, timeout_s: float) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(timeout_s, self.give_up)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded_protocol(limits: ConnectionLimits) -> Callable[..., BoundedHttpProtocol]:
    """For `uvicorn.Config(http=…)`; one per server."""
    return functools.partial(BoundedHttpProtocol, limits, {}, Arrivals())


def bound_connections(limits: ConnectionLimits | None = None) -> None:
    """Apply the limits to every server that is started in this process from now on without a protocol of its own, and
    allow the process as many connections as the system does."""
    raise_file_limit()
    protocol = bounded_protocol(limits or ConnectionLimits())
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]
