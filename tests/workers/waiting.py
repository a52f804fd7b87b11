"""Waiting for a condition: so long that a machine that stands still for seconds is not taken for a fault of ours."""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

WAIT_S = 60.0
_LOOK_S = 0.005


def wait_until(is_so: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not so within {timeout_s:g} s"
        time.sleep(_LOOK_S)


def collect_until(is_so: Callable[[], object]) -> None:
    """Collect garbage until it is so. While a collection runs in another thread, `gc.collect` does nothing; if that one
    does not end, the error shows what all threads do."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        num_before = gc.get_stats()[-1]["collections"]
        gc.collect()
        if is_so():
            return
        has_collected = gc.get_stats()[-1]["collections"] > num_before
        if time.monotonic() >= deadline_s:
            blocked = "" if has_collected else f", and no collection ends in another thread:\n{_stacks()}"
            raise AssertionError(f"not so within {WAIT_S:g} s{blocked}")
        time.sleep(_LOOK_S)


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames)


def is_hung_up_after(noise: bytes, address: tuple[str, int]) -> bool:
    """Whether whoever listens there answers with nothing but the end. What it has not read then resets the
    connection."""
    with socket.create_connection(address, timeout=WAIT_S) as sock:
        try:
            sock.sendall(noise)
            return sock.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True
