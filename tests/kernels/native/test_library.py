"""The library of native kernels: compiled once, checked when it is loaded, and safe for threads and forks."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tensorweave.kernels.native import library, structures
from tensorweave.kernels.native.library import use_threads
from tests.kernels.forms import needs_native, operations_of

pytestmark = needs_native


def test_loops_of_several_callers_at_once() -> None:
    assert use_threads(3)
    make_linear = operations_of("native", torch.float32).make_linear
    linears = [make_linear(torch.randn(300, 128), None) for _ in range(4)]
    x = torch.randn(40, 128)
    expected = [linear(x) for linear in linears]

    def work(i: int) -> bool:
        return all(torch.equal(linears[i](x), expected[i]) for _ in range(300))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4), timeout=200))


def test_a_forked_child_computes_too() -> None:
    assert use_threads(2)
    linear, x = operations_of("native", torch.float32).make_linear(torch.randn(300, 128), None), torch.randn(4, 128)
    expected = linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_structure_that_differs_from_the_c_source_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(ctypes.Structure):
        _fields_ = structures.StackStep._fields_[:-1]

    loaded = library._library()
    assert loaded is not None
    structures.check_sizes(loaded)
    monkeypatch.setitem(structures._C_NAMES, "stack_step", Short)
    with pytest.raises(AssertionError, match="stack_step has"):
        structures.check_sizes(loaded)


@pytest.mark.slow
def test_it_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._library.cache_clear()
    try:
        assert library._library() is not None
        (built,) = (tmp_path / "tensorweave" / "kernels").iterdir()
        os.utime(built, (1, 1))
        library._library.cache_clear()
        assert library._library() is not None
        assert built.stat().st_mtime == 1
    finally:
        library._library.cache_clear()


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_there_is_no_library(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_COMPILER", compiler)
    library._library.cache_clear()
    try:
        assert library._library() is None
    finally:
        library._library.cache_clear()
    assert "no native CPU kernels" in caplog.text


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORWEAVE_NATIVE", "0")
    library._library.cache_clear()
    try:
        assert library._library() is None
    finally:
        library._library.cache_clear()
