"""The processes of a service that we have started, down to the last: to look at, to strike, and to end.

A signal goes only to a process that stands in the service's own process tree (psutil checks pid and start time
together), never to a pid or a name alone.
"""

from __future__ import annotations

import contextlib
import os

import psutil


class ProcessTree:
    """All processes that a service has had. Leaving the context kills those that still live."""

    def __init__(self) -> None:
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> ProcessTree:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def note(self, root_pid: int) -> None:
        """Remember `root_pid`, which must be our own child, and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(root_pid)
            if root.ppid() == os.getpid():
                self._seen |= {root, *root.children(recursive=True)}

    def find(self, pid: int) -> psutil.Process | None:
        """The living process with this pid, if it is one of the service's."""
        return next((process for process in self.living() if process.pid == pid), None)

    def named(self, prefix: str) -> psutil.Process | None:
        """A process of the service whose command line begins so: Ray names an actor's after its class."""
        for process in self.living():
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(prefix):
                    return process
        return None

    def listener(self, port: int) -> psutil.Process | None:
        """The process of the service that listens on this port."""
        for process in self.living():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for socket in process.net_connections("tcp"):
                    if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port:
                        return process
        return None

    def living(self) -> list[psutil.Process]:
        return [process for process in self._seen if _is_living(process)]

    def kill(self) -> int:
        """SIGKILL to all that still live; how many those were."""
        left = self.living()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10.0)
        return len(left)


def _is_living(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
