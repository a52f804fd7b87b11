"""`ProcessTree`: all processes of a service that this process has started, to inspect, to signal and to end them.

Only processes in the service's own process tree are signalled (psutil checks pid and start time together), never a pid
or a name alone.
"""

from __future__ import annotations

import contextlib
import os

import psutil


class ProcessTree:
    """All processes that a service has had. Leaving the context kills those that are still running."""

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
        """The running process with this pid, if it belongs to the service."""
        return next((process for process in self.living() if process.pid == pid), None)

    def named(self, prefix: str) -> psutil.Process | None:
        """A process of the service whose command line begins with `prefix`: Ray names an actor's process after its
        class."""
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
        """Kill all processes that are still running; return their number."""
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
