"""`Door`: a listening socket for peers that share a secret. Strangers who come to it hold little, and not for long.

Each connection is handed to `handle`, which must not block (it starts a thread) and calls `know` once the peer has
shown the secret. Until then the connection is one of `MAX_STRANGERS` at most, the oldest of which make room, and it is
hung up on after `GREETING_TIMEOUT_S` in all, however many bytes have trickled in.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from tensorweave.cluster.limited_log import LimitedLog

logger = logging.getLogger(__name__)

MAX_STRANGERS: Final = 64
GREETING_TIMEOUT_S: Final = 5.0
_LOOK_INTERVAL_S: Final = 1.0
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Door:
    """Listens on `host` alone, at a port of the system's choice, until `close`."""

    def __init__(self, host: str, name: str, handle: Callable[[socket.socket], None]) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._since_s: dict[socket.socket, float] = {}
        self._closing = threading.Event()
        self._log = LimitedLog(logger, logging.WARNING)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.settimeout(_LOOK_INTERVAL_S)
        self.address = (host, int(self._listener.getsockname()[1]))
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)

    def open(self) -> None:
        self._thread.start()

    def know(self, sock: socket.socket) -> None:
        """The peer has shown the secret, or has gone: no deadline of ours concerns it any more."""
        with self._lock:
            self._since_s.pop(sock, None)

    def close(self, timeout_s: float) -> None:
        """No more connections; those handed on are their handlers' to close."""
        self._closing.set()
        hang_up(self._listener)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _accept(self) -> None:
        while not self._closing.is_set():
            self._turn_away()
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._is_passing(error):
                    return
                continue
            with self._lock:
                self._since_s[sock] = time.monotonic()
            self._handle(sock)

    def _is_passing(self, error: OSError) -> bool:
        """Where the process has no descriptor left, the next try waits for one to come back."""
        if self._closing.is_set():
            return False
        if error.errno in _EXHAUSTED:
            self._log.tell(f"{self._thread.name}: no connection can be taken ({error.strerror}); trying again")
            self._closing.wait(_LOOK_INTERVAL_S)
        return error.errno in _EXHAUSTED or error.errno == errno.ECONNABORTED

    def _turn_away(self) -> None:
        oldest_s = time.monotonic() - GREETING_TIMEOUT_S
        with self._lock:
            places = list(self._since_s.items())
            late = [sock for sock, since_s in places if since_s < oldest_s]
            crowd = [sock for sock, _ in places[: max(0, len(places) - MAX_STRANGERS)]]
            for sock in {*late, *crowd}:
                del self._since_s[sock]
        for sock in {*late, *crowd}:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # its own thread closes it


def hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
