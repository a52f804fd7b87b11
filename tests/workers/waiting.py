"""Waiting for a condition: so long that a machine that stands still for seconds is not taken for a fault of ours."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable

WAIT_S = 60.0
_LOOK_S = 0.005


def wait_until(is_so: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not so within {timeout_s:g} s"
        time.sleep(_LOOK_S)


def collect_until(is_so: Callable[[], object]) -> None:
    """Collect garbage until it is so: `gc.collect` does nothing while a collection runs in another thread."""

    def is_so_now() -> object:
        gc.collect()
        return is_so()

    wait_until(is_so_now)


def is_hung_up_after(noise: bytes, address: tuple[str, int]) -> bool:
    """Whether whoever listens there answers with nothing but the end. What it has not read then resets the
    connection."""
    with socket.create_connection(address, timeout=WAIT_S) as sock:
        try:
            sock.sendall(noise)
            return sock.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True
