"""`HostChannel`: how rank 0 tells the other ranks of its host what a step does: Unix sockets, which the kernel keeps in
the host's memory.

A gang whose ranks share a host and its network namespace uses it in place of gloo's broadcast. A rank that ends closes
its socket, so the others notice at once, whatever they wait for.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from tensorweave.cluster.errors import WorkerLost

_LENGTH: Final = struct.Struct("<Q")
_SECRET_BYTES: Final = 16
_HELLO: Final = struct.Struct(f"<{_SECRET_BYTES}sI")
_PEER: Final = struct.Struct("3i")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE: Final = Path("/proc/self/ns/net")
_BACKLOG: Final = 64
_JOIN_TIMEOUT_S: Final = 20.0


class Agreement(Protocol):
    """What `open_host_channel` asks of a gang's `Comm` meanwhile."""

    rank: int
    size: int

    def agree(self, message: bytes | None) -> bytes: ...

    def agree_min(self, value: int) -> int: ...


class HostChannel:
    """Rank 0 has a socket to each other rank, and each of those has one. `timeout_s`: longest silence of a peer."""

    def __init__(self, socks: Sequence[socket.socket], ranks: Sequence[int], timeout_s: float) -> None:
        self._socks = tuple(zip(ranks, socks, strict=True))
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        for _, sock in self._socks:
            sock.settimeout(timeout_s)

    def send(self, message: bytes) -> None:
        """Raises WorkerLost."""
        frame = _LENGTH.pack(len(message)) + message
        for rank, sock in self._socks:
            try:
                sock.sendall(frame)
            except OSError as error:
                raise _lost(rank, error) from error

    def receive(self) -> bytes:
        """Raises WorkerLost."""
        ((rank, sock),) = self._socks
        try:
            (length,) = _LENGTH.unpack(_read(sock, _LENGTH.size))
            return bytes(_read(sock, length))
        except OSError as error:
            raise _lost(rank, error) from error

    def close(self) -> None:
        for _, sock in self._socks:
            sock.close()


def _lost(rank: int, error: OSError) -> WorkerLost:
    return WorkerLost(f"rank {rank} is gone or silent ({error or type(error).__name__})")


def _read(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = sock.recv_into(view[got:])
        if count == 0:
            raise ConnectionResetError("its socket is closed")
        got += count
    return data


def open_host_channel(comm: Agreement, timeout_s: float) -> HostChannel | None:
    """Every rank calls it. None on every rank where they are on several hosts, or the system is not Linux."""
    if not _share_host(comm):
        return None
    return _accept_all(comm, timeout_s) if comm.rank == 0 else _connect(comm, timeout_s)


def _share_host(comm: Agreement) -> bool:
    mine = b""
    if sys.platform == "linux" and _BOOT_ID.is_file() and _NAMESPACE.exists():
        mine = _BOOT_ID.read_bytes() + str(_NAMESPACE.stat().st_ino).encode()
    leader = comm.agree(mine if comm.rank == 0 else None)
    return bool(comm.agree_min(int(mine != b"" and mine == leader)))


def _accept_all(comm: Agreement, timeout_s: float) -> HostChannel | None:
    name, secret = f"\0tensorweave-{secrets.token_hex(8)}".encode(), secrets.token_bytes(_SECRET_BYTES)
    by_rank: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen(_BACKLOG)
        listener.settimeout(_JOIN_TIMEOUT_S)
        comm.agree(secret + name)
        with contextlib.suppress(TimeoutError):
            while len(by_rank) < comm.size - 1:
                sock, _ = listener.accept()
                sock.settimeout(_JOIN_TIMEOUT_S)
                if (rank := _read_hello(sock, secret)) is None:
                    sock.close()
                else:
                    by_rank[rank] = sock
    is_complete = comm.agree_min(int(len(by_rank) == comm.size - 1))
    return HostChannel(list(by_rank.values()), list(by_rank), timeout_s) if is_complete else None


def _connect(comm: Agreement, timeout_s: float) -> HostChannel | None:
    told = comm.agree(None)
    sock, has_joined = socket.socket(socket.AF_UNIX), True
    sock.settimeout(_JOIN_TIMEOUT_S)
    try:
        sock.connect(told[_SECRET_BYTES:])
        sock.sendall(_HELLO.pack(told[:_SECRET_BYTES], comm.rank))
    except OSError:
        has_joined = False
    return HostChannel([sock], [0], timeout_s) if comm.agree_min(int(has_joined)) else None


def _read_hello(sock: socket.socket, secret: bytes) -> int | None:
    """The rank that calls; None if it is a stranger."""
    _, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.geteuid():
        return None
    try:
        offered, rank = _HELLO.unpack(_read(sock, _HELLO.size))
    except OSError:
        return None
    return int(rank) if hmac.compare_digest(offered, secret) else None
