"""Peers that do not know the secret, at every port of a service's processes on a host."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hosts.network import Host

_LISTENER = re.compile(r"LISTEN\s+\d+\s+\d+\s+(\S+):(\d+)\s.*pid=(\d+)")
_OURS = ("ray::RankWorker", "ray::ServeReplica", "ray::PoolSupervisor", "ray::ServiceActor")
_HOLD_S = 8.0
"""Longer than our ports wait for a greeting."""


def ports_of(host: Host) -> dict[int, str]:
    """The ports at which processes of ours listen for other hosts, and who they are."""
    listed = host.run(["ss", "-Hltnp"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    found = {}
    for line in listed.splitlines():
        if match := _LISTENER.search(line):
            address, port, pid = match.groups()
            name = host.run(["cat", f"/proc/{pid}/cmdline"], {"PATH": "/usr/bin:/bin"}).replace("\0", " ").strip()
            if name.startswith(_OURS) and not address.startswith(("127.", "[::1]")):
                found[int(port)] = name
    return found


def garbage(seed: int) -> Iterator[list[bytes]]:
    """What a stranger sends, in pieces: after each but the last one it waits for a second."""
    draw = random.Random(seed)
    yield [draw.randbytes(64 << 10)]
    yield [b"\xff\xff\xff\xff" + bytes(64)]  # a frame of 4 GB
    yield [(1000).to_bytes(4, "little") + b"\x93"]  # one that is never whole
    yield [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]
    yield [draw.randbytes(1) for _ in range(int(_HOLD_S))]
    yield []


class Strangers:
    """All kinds of garbage at once, at each of the ports, until `stop`."""

    def __init__(self, ports: dict[Host, list[int]], seed: int = 0) -> None:
        self.num_connections = 0
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._knock, args=((host.address, port), pieces))
            for host, listening in ports.items()
            for port in listening
            for pieces in garbage(seed + port)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _knock(self, address: tuple[str, int], pieces: list[bytes]) -> None:
        while not self._is_over.is_set():
            try:
                with socket.create_connection(address, timeout=5) as sock:
                    sock.settimeout(_HOLD_S)
                    for number, piece in enumerate(pieces):
                        if number:
                            time.sleep(1.0)
                        sock.sendall(piece)
                    while sock.recv(4096):
                        pass
            except OSError:
                pass
            with self._lock:
                self.num_connections += 1
            self._is_over.wait(0.1)


def resident_mb(host: Host) -> dict[int, float]:
    """Of the processes of ours on a host."""
    found = {}
    for pid, line in host.processes().items():
        if line.startswith(_OURS):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found[pid] = pages * 4096 / 1e6
    return found
