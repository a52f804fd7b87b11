"""`AdminPort`: the admin app on a thread of the process that keeps the pools.

The port is never a reason for the service to fail: where another program has it, it is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from tensorweave.cluster.sentences import sentence_of
from tensorweave.deploy.config_tls import ListenerTlsConfig
from tensorweave.router.http.connections import ConnectionLimits, bounded_protocol

logger = logging.getLogger(__name__)

_RETRY_S: Final = 5.0
_IDLE_TIMEOUT_S: Final = 90
_GRACE_S: Final = 1
_CLOSE_TIMEOUT_S: Final = 5.0
_LIMITS: Final = ConnectionLimits(max_waiting=64)


class AdminPort:
    """`build` makes the app, on the thread's event loop."""

    def __init__(
        self, host: str, port: int, build: Callable[[], ASGIApp], tls: ListenerTlsConfig | None = None
    ) -> None:
        self._host = host
        self._port = port
        self._build = build
        self._tls = tls
        self._is_closing = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="admin-port", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            try:
                listener = listening_socket(self._host, self._port)
            except OSError as error:
                logger.warning("the admin port %s:%d: %s", self._host, self._port, sentence_of(error))
                self._is_closing.wait(_RETRY_S)
                continue
            with listener:
                asyncio.run(self._serve(listener))
            return

    async def _serve(self, listener: socket.socket) -> None:
        config = uvicorn.Config(
            self._build(),
            http=bounded_protocol(_LIMITS),  # type: ignore[arg-type]
            ws="none",
            access_log=False,
            log_config=None,
            timeout_keep_alive=_IDLE_TIMEOUT_S,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=None if self._tls is None else self._tls.certificate,
            ssl_keyfile=None if self._tls is None else self._tls.key,
        )
        self._server = uvicorn.Server(config)
        if self._is_closing.is_set():  # `close` came before there was a server to end
            self._server.should_exit = True
        await self._server.serve(sockets=[listener])


def listening_socket(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
