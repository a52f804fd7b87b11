"""The threads of a loop stay off each other's cores, and the caller gets parts back from a core that was taken."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tensorweave.kernels.native import library
from tensorweave.kernels.native.library import use_threads
from tests.kernels.forms import needs_native, operations_of

CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [0]
pytestmark = [needs_native, pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")]

_DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("cores") / "cores.so"
    source = Path(__file__).with_name("cores_driver.c")
    flags = ["-std=gnu11", "-shared", "-fPIC", "-pthread", "-I", str(library._SOURCES)]
    subprocess.run(["gcc", *flags, str(source), "-o", str(built)], check=True, timeout=120)
    return ctypes.CDLL(str(built))


@pytest.fixture
def own_cores() -> Iterator[None]:
    """The test may change where this thread runs."""
    yield
    os.sched_setaffinity(0, CORES)


@pytest.mark.parametrize("here", CORES[:2])
def test_a_helper_leaves_its_core(driver: ctypes.CDLL, own_cores: None, here: int) -> None:
    there = sum(CORES[:2]) - here
    deadline_s = time.monotonic() + _DEADLINE_S
    os.sched_setaffinity(0, [here])
    os.sched_setaffinity(0, CORES[:2])  # still on the first one
    while driver.leave(here, here) != there:  # it may have been moved back before it looked
        assert time.monotonic() < deadline_s


@pytest.mark.skipif(len(CORES) < 3, reason="needs three cores")
def test_a_helper_does_not_go_where_another_one_is(driver: ctypes.CDLL, own_cores: None) -> None:
    first, second, third = CORES[:3]
    deadline_s = time.monotonic() + _DEADLINE_S
    os.sched_setaffinity(0, [first])
    os.sched_setaffinity(0, [first, second, third])
    while driver.leave(first, second) != third:
        assert time.monotonic() < deadline_s


def test_a_helper_with_one_core_stays(driver: ctypes.CDLL, own_cores: None) -> None:
    os.sched_setaffinity(0, CORES[:1])
    assert driver.leave(CORES[0], CORES[0]) == CORES[0]


def test_a_helper_that_does_not_run_is_fetched(driver: ctypes.CDLL, own_cores: None) -> None:
    here = CORES[0]
    os.sched_setaffinity(0, [here])
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        os.sched_setaffinity(0, CORES)
        driver.begin_work()
        begun.set()
        may_end.wait(_DEADLINE_S)

    helper = threading.Thread(target=work)
    helper.start()
    assert begun.wait(_DEADLINE_S)
    assert helper.native_id is not None
    try:
        assert not driver.look()  # nothing to compare with
        deadline_s = time.monotonic() + _DEADLINE_S
        while not driver.look():  # until it waits
            assert time.monotonic() < deadline_s
        driver.fetch()
        assert os.sched_getaffinity(helper.native_id) == {here}
        assert not driver.look()  # it is here already
        driver.end_work()
        driver.release()
        assert os.sched_getaffinity(helper.native_id) == set(CORES)
        assert not driver.look()  # it has no part
    finally:
        may_end.set()
        helper.join(_DEADLINE_S)


def test_results_beside_a_process_that_takes_a_core(own_cores: None) -> None:
    assert use_threads(2)
    linear, x = operations_of("native", torch.float32).make_linear(torch.randn(300, 128), None), torch.randn(40, 128)
    expected = linear(x)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, CORES[1:])
        os.sched_setaffinity(0, CORES[:1])
        assert all(torch.equal(linear(x), expected) for _ in range(500))
    finally:
        busy.kill()
        busy.wait(_DEADLINE_S)
