"""How a KV connection's bytes travel: as they are (`PlainPeers`), or encrypted (`TlsPeers`).

`TlsSocket` may be read by one thread while another writes, which Python's own TLS sockets may not: OpenSSL works in
memory, under a lock, and the socket is waited for without it.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from typing import Final, Protocol

from tensorweave.cluster.tls import TlsFiles, tls_reason

_CHUNK_BYTES: Final = 256 << 10
"""Encrypted, sent and received at once."""


class ByteSocket(Protocol):
    """The part of `socket.socket` that a frame connection needs."""

    def recv_into(self, buffer: memoryview, nbytes: int, flags: int, /) -> int: ...

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int: ...


class PeerSockets(Protocol):
    def accepted(self, sock: socket.socket) -> ByteSocket: ...

    def connected(self, sock: socket.socket) -> ByteSocket: ...


class PlainPeers:
    def accepted(self, sock: socket.socket) -> ByteSocket:
        return sock

    def connected(self, sock: socket.socket) -> ByteSocket:
        return sock


class TlsPeers:
    """Raises ValueError if a file is missing or wrong."""

    def __init__(self, files: TlsFiles) -> None:
        self._accepting = files.accepting()
        self._connecting = files.connecting()

    def accepted(self, sock: socket.socket) -> ByteSocket:
        return TlsSocket(sock, self._accepting, is_server=True)

    def connected(self, sock: socket.socket) -> ByteSocket:
        return TlsSocket(sock, self._connecting, is_server=False)


class TlsSocket:
    """`sock` blocks, with timeouts of the system: where it raises BlockingIOError, so do the methods, and the next call
    goes on from there. The first call of either kind is the handshake."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> None:
        self._sock = sock
        self._arrived, self._encrypted = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._encrypted, server_side=is_server)
        self._lock = threading.Lock()
        self._shaking = threading.Lock()
        self._is_open = False
        self._unsent = memoryview(b"")
        self._num_accepted = 0

    def recv_into(self, buffer: memoryview, nbytes: int, flags: int, /) -> int:
        """Decrypted bytes, at most one record's; 0 at the end. `flags` are ignored. Raises OSError."""
        self._shake_hands()
        while True:
            with self._lock:
                try:
                    return int(self._tls.read(len(buffer), buffer))
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    return 0
                except ssl.SSLError as error:
                    raise OSError(tls_reason(error)) from None
            if not self._take():
                return 0

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int:
        """Return how many bytes of `buffers` have been sent. Raises OSError."""
        self._shake_hands()
        if not self._num_accepted:
            with self._lock:
                self._num_accepted = self._encrypt(buffers)
                self._unsent = memoryview(self._encrypted.read())
        self._flush()
        num_bytes, self._num_accepted = self._num_accepted, 0
        return num_bytes

    def _encrypt(self, buffers: Sequence[memoryview]) -> int:
        num_bytes = 0
        for buffer in buffers:
            piece = buffer.cast("B")[: _CHUNK_BYTES - num_bytes]
            if len(piece):
                num_bytes += self._tls.write(piece)
        return num_bytes

    def _shake_hands(self) -> None:
        if self._is_open:
            return
        with self._shaking:
            while not self._is_open:
                self._flush()
                with self._lock:
                    is_done = self._advance()
                    self._unsent = memoryview(self._encrypted.read())
                self._flush()
                if is_done:
                    self._is_open = True
                elif not self._take():
                    raise OSError("the peer closed the connection during the TLS handshake")

    def _advance(self) -> bool:
        """Whether the handshake has ended. A refusal is sent to the peer."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            self._sock.send(self._encrypted.read())
            raise OSError(tls_reason(error)) from None
        return True

    def _take(self) -> bool:
        """Receive something; whether there was anything."""
        data = self._sock.recv(_CHUNK_BYTES)
        with self._lock:
            self._arrived.write(data)
        return bool(data)

    def _flush(self) -> None:
        while len(self._unsent):
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
