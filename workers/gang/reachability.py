"""Checks that one rank can connect to another one's host, before torch waits for it without saying why."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tensorweave.cluster.errors import WorkerLost

_ATTEMPT_TIMEOUT_S: Final = 5.0
_RETRY_INTERVAL_S: Final = 0.5


@contextmanager
def listening(host: str, num_callers: int) -> Iterator[tuple[str, int]]:
    """Yield an address at `host` to which `num_callers` can connect inside the block. The connections are never
    accepted: the kernel completes those that fit in the backlog."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=num_callers) as server:
        yield host, int(server.getsockname()[1])


def await_reachable(host: str, port: int, timeout_s: float, *, who: str, whom: str) -> None:
    """Try to connect until one attempt succeeds. `who` connects to `whom`, as the error calls them.

    Raises:
        WorkerLost: no attempt has succeeded within `timeout_s`.
    """
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        left_s = end_s - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.01, min(_ATTEMPT_TIMEOUT_S, left_s))).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY_INTERVAL_S >= end_s:
                raise WorkerLost(
                    f"{who} cannot reach {whom} at {host}:{port} ({error}); "
                    f"it has tried for {timeout_s:g} s: can these hosts connect to each other?"
                ) from error
        pause.wait(_RETRY_INTERVAL_S)
