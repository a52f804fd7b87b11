"""Waiting for garbage to be gone, beside a collection in another thread."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from tests.workers import waiting
from tests.workers.waiting import WAIT_S, collect_until


class Garbage:
    """In a cycle. A collection that finds it waits for `may_go`."""

    def __init__(self, may_go: threading.Event, is_found: threading.Event) -> None:
        self.me, self.may_go, self.is_found = self, may_go, is_found

    def __del__(self) -> None:
        self.is_found.set()
        self.may_go.wait(WAIT_S)


@pytest.fixture
def may_end() -> Iterator[threading.Event]:
    """A collection runs in another thread until this is set."""
    may_end, is_found = threading.Event(), threading.Event()

    def collect_garbage() -> None:
        Garbage(may_end, is_found)
        gc.collect()

    gc.disable()  # else any thread may find the garbage
    collecting = threading.Thread(target=collect_garbage, name="a collection that goes on")
    collecting.start()
    assert is_found.wait(WAIT_S)
    yield may_end
    may_end.set()
    collecting.join(WAIT_S)
    gc.enable()


def garbage() -> weakref.ref[Garbage]:
    may_go = threading.Event()
    may_go.set()
    return weakref.ref(Garbage(may_go, threading.Event()))


def test_garbage_is_collected_once_no_other_thread_collects(may_end: threading.Event) -> None:
    left = garbage()
    assert gc.collect() == 0
    assert left() is not None
    num_looks = 0

    def is_gone() -> bool:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 3:
            may_end.set()
        return left() is None

    collect_until(is_gone)
    assert num_looks >= 3


@pytest.mark.usefixtures("may_end")
def test_a_collection_that_does_not_end_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_S", 0.1)
    left = garbage()
    with pytest.raises(AssertionError, match=r"(?s)no collection ends.*a collection that goes on:.*may_go.wait"):
        collect_until(lambda: left() is None)
