"""`GuardedListener`: a listening socket for peers that share a secret; a connection without it holds little, briefly.

Each connection is passed to `handle`, which must not block (it starts a thread) and calls `trust` once the peer has
sent the secret. Until then it is one of at most `MAX_UNKNOWN_PEERS`, of which the oldest are closed first, and it is
closed `GREETING_TIMEOUT_S` after it was opened, however many bytes have arrived.
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

MAX_UNKNOWN_PEERS: Final = 64
GREETING_TIMEOUT_S: Final = 5.0
_CHECK_INTERVAL_S: Final = 1.0
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class GuardedListener:
    """Listens on `host` only, at a port that the system chooses, until `close`."""

    def __init__(self, host: str, name: str, handle: Callable[[socket.socket], None]) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._accepted_s: dict[socket.socket, float] = {}
        """When each connection that is not trusted yet was accepted, the oldest first."""
        self._closing = threading.Event()
        self._log = LimitedLog(logger, logging.WARNING)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.settimeout(_CHECK_INTERVAL_S)
        self.address = (host, int(self._listener.getsockname()[1]))
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def trust(self, sock: socket.socket) -> None:
        """Stop limiting a connection: its peer has sent the secret, or it is closed."""
        with self._lock:
            self._accepted_s.pop(sock, None)

    def close(self, timeout_s: float) -> None:
        """Accept no more connections. Those passed to `handle` stay open."""
        self._closing.set()
        close_socket(self._listener)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _accept(self) -> None:
        while not self._closing.is_set():
            self._close_unknown_peers()
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._is_temporary(error):
                    return
                continue
            with self._lock:
                self._accepted_s[sock] = time.monotonic()
            self._handle(sock)

    def _is_temporary(self, error: OSError) -> bool:
        """If the process has no descriptor left, this waits before the next attempt."""
        if self._closing.is_set():
            return False
        if error.errno in _EXHAUSTED:
            self._log.write(f"{self._thread.name}: no connection can be taken ({error.strerror}); trying again")
            self._closing.wait(_CHECK_INTERVAL_S)
        return error.errno in _EXHAUSTED or error.errno == errno.ECONNABORTED

    def _close_unknown_peers(self) -> None:
        oldest_s = time.monotonic() - GREETING_TIMEOUT_S
        with self._lock:
            unknown = list(self._accepted_s.items())
            late = [sock for sock, accepted_s in unknown if accepted_s < oldest_s]
            surplus = [sock for sock, _ in unknown[: max(0, len(unknown) - MAX_UNKNOWN_PEERS)]]
            for sock in {*late, *surplus}:
                del self._accepted_s[sock]
        for sock in {*late, *surplus}:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # the thread that reads it closes it


def close_socket(sock: socket.socket) -> None:
    """Close it. A thread that is reading it wakes up."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
