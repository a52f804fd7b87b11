"""Shuts the ports that gloo leaves open after a group stands.

Each gloo group listens for its peers and goes on listening for ever, though every pair is connected once the group
stands. A stranger's connection there costs the process a descriptor until it ends: 17,600 of them, which took 48 s,
ended a gang. gloo has no way to stop listening, so its listening descriptor is replaced by one on which nothing ever
happens; gloo removes and closes that one in its turn.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_DESCRIPTORS: Final = Path("/proc/self/fd")
_WATCHED: Final = re.compile(r"^tfd:\s+(\d+) .* ino:([0-9a-f]+) ", re.MULTILINE)


@contextlib.contextmanager
def shut_afterwards() -> Iterator[None]:
    """Sockets that begin to listen inside, watched by an epoll as gloo's are, listen no more afterwards. NCCL's own are
    not so watched and stay. Nothing of ours may begin to listen meanwhile. Linux only; elsewhere all stay."""
    if sys.platform != "linux":
        yield
        return
    before = _listening()
    yield
    for descriptor, inode in _listening() - before:
        if (watcher := _watcher(descriptor, inode)) is not None:
            _replace(descriptor, watcher)


def _listening() -> set[tuple[int, int]]:
    """Descriptor and inode of each socket of this process that listens."""
    found = set()
    for descriptor in map(int, os.listdir(_DESCRIPTORS)):
        with contextlib.suppress(OSError):  # closed in between
            status = os.fstat(descriptor)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.add((descriptor, status.st_ino))
    return found


def _watcher(descriptor: int, inode: int) -> int | None:
    """The epoll descriptor that watches this one, if exactly one does."""
    watchers = []
    for name in os.listdir(_DESCRIPTORS):
        with contextlib.suppress(OSError):
            if "eventpoll" in os.readlink(_DESCRIPTORS / name):
                watched = _WATCHED.findall(Path(f"/proc/self/fdinfo/{name}").read_text(encoding="ascii"))
                if (str(descriptor), f"{inode:x}") in watched:
                    watchers.append(int(name))
    return watchers[0] if len(watchers) == 1 else None


def _replace(descriptor: int, watcher: int) -> None:
    """`descriptor` becomes an event that never comes, watched for nothing by the same epoll."""
    inert = os.eventfd(0, os.EFD_CLOEXEC)
    with select.epoll.fromfd(os.dup(watcher)) as epoll:
        epoll.unregister(descriptor)
        os.dup2(inert, descriptor, inheritable=False)
        epoll.register(descriptor, 0)
    os.close(inert)
