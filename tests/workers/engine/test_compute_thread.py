"""A compute thread works in order, hands on its errors and ends."""

from __future__ import annotations

import threading

import pytest

from tensorweave.workers.engine.compute_thread import ComputeThread, Here
from tests.workers.waiting import WAIT_S


def test_what_is_submitted_is_computed_in_order_on_one_thread() -> None:
    place, gate, order = ComputeThread("test"), threading.Event(), list[int]()
    place.submit(lambda: gate.wait(WAIT_S))
    pending = [place.submit(lambda i=i: (order.append(i), threading.current_thread().name)[1]) for i in range(3)]
    doubled = pending[0].then(lambda name: 2 * name)
    assert order == []
    gate.set()
    assert [each.result() for each in pending] == ["test"] * 3
    assert doubled.result() == "testtest" == doubled.result()
    assert order == [0, 1, 2]
    place.shutdown()
    assert not place._thread.is_alive()


def test_each_computation_is_timed() -> None:
    seconds: list[float] = []
    place, gate = ComputeThread("test", seconds.append), threading.Event()
    waited = place.submit(lambda: gate.wait(WAIT_S))
    failing = waited.then(lambda done: 1 // 0)
    gate.set()
    with pytest.raises(ZeroDivisionError):
        failing.result()
    place.shutdown()
    assert len(seconds) == 2
    assert min(seconds) >= 0


def test_after_an_error_nothing_is_computed() -> None:
    place = ComputeThread("test")
    broken = place.submit(lambda: 1 // 0)
    after, then = place.submit(lambda: 5), broken.then(lambda value: value)
    for pending in (broken, after, then):
        with pytest.raises(ZeroDivisionError):
            pending.result()
    place.shutdown()


def test_here_is_at_once() -> None:
    assert Here().submit(lambda: threading.current_thread()).result() is threading.current_thread()
