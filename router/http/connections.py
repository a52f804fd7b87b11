"""Bounds on HTTP connections that hold a place without a whole request: uvicorn's protocol, with deadlines.

uvicorn itself closes only what is idle after an answer: a connection that never sends a request, or half a head, it
keeps for ever. The deploy room puts this protocol in place of uvicorn's, before a server starts.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tensorweave.router.http.asgi import REQUEST_ID_HEADER, is_request_id


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """A new connection's head must begin within `head_timeout_s`, and each head end that long after it began. An answer
    that did not need the request's whole body leaves `rest_timeout_s` for what still comes of it, and a client that
    takes nothing of an answer for `stall_timeout_s` is gone. Of connections without a first whole head there are
    `max_waiting` at most: one more closes the oldest of them."""

    head_timeout_s: float = 10.0
    max_head_bytes: int = 64 << 10
    rest_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    max_waiting: int = 512


_HEAD_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. `waiting` is shared by all of a server: those without a first whole head, the oldest first."""

    def __init__(
        self, limits: ConnectionLimits, waiting: dict[BoundedHttpProtocol, None], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._waiting = waiting
        self._deadline: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.stall_timeout_s * 1e3))
        self._waiting[self] = None
        if len(self._waiting) > self._limits.max_waiting:
            next(iter(self._waiting)).give_up()
        self._expect_within(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.pop(self, None)
        self._expect_nothing()
        super().connection_lost(exc)

    def give_up(self) -> None:
        self._waiting.pop(self, None)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        is_answered = self.cycle is None or self.cycle.response_complete
        if self._deadline is None and is_answered:
            self._expect_within(self._limits.rest_timeout_s)
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
        self._expect_within(self._limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """What is no valid request id is as good as none. Serve would send it back as it came, beside our own."""
        if name.lower() != REQUEST_ID_HEADER or is_request_id(value):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._waiting.pop(self, None)
        self._expect_nothing()
        super().on_headers_complete()

    def _expect_within(self, timeout_s: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(timeout_s, self.give_up)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded_protocol(limits: ConnectionLimits) -> Callable[..., BoundedHttpProtocol]:
    """For `uvicorn.Config(http=…)`; one for each server."""
    return functools.partial(BoundedHttpProtocol, limits, {})


def bound_connections(limits: ConnectionLimits | None = None) -> None:
    """Every server that starts in this process from now on, and does not name a protocol, has these bounds."""
    protocol = bounded_protocol(limits or ConnectionLimits())
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]
