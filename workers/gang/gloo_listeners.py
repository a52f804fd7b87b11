"""Closes the ports that gloo leaves open once a process group has formed.

Each gloo group goes on listening for as long as it lives, though every pair is connected once it has formed. Each
connection to such a port costs the process a descriptor: 17,600 of them, made within 48 s, ended a gang. gloo cannot be
told to stop listening, so its listening descriptor is replaced by one on which nothing ever happens; gloo removes and
closes that one at its end.
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
def closing_listeners() -> Iterator[None]:
    """Close sockets that begin to listen inside the block and are watched by an epoll, as gloo's are. NCCL's are not
    watched and stay open. Nothing else may begin to listen meanwhile. On systems other than Linux all stay open."""
    if sys.platform != "linux":
        yield
        return
    before = _listening()
    yield
    for descriptor, inode in _listening() - before:
        if (watcher := _watcher(descriptor, inode)) is not None:
            _replace(descriptor, watcher)


def _listening() -> set[tuple[int, int]]:
    """Descriptor and inode of each listening socket of this process."""
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
    """The epoll descriptor that watches this one, if there is exactly one."""
    watchers = []
    for name in os.listdir(_DESCRIPTORS):
        with contextlib.suppress(OSError):
            if "eventpoll" in os.readlink(_DESCRIPTORS / name):
                watched = _WATCHED.findall(Path(f"/proc/self/fdinfo/{name}").read_text(encoding="ascii"))
                if (str(descriptor), f"{inode:x}") in watched:
                    watchers.append(int(name))
    return watchers[0] if len(watchers) == 1 else None


def _replace(descriptor: int, watcher: int) -> None:
    """Make `descriptor` an eventfd that is never signalled, registered for no events with the same epoll."""
    inert = os.eventfd(0, os.EFD_CLOEXEC)
    with select.epoll.fromfd(os.dup(watcher)) as epoll:
        epoll.unregister(descriptor)
        os.dup2(inert, descriptor, inheritable=False)
        epoll.register(descriptor, 0)
    os.close(inert)
