"""Kernels are compiled before their first launch, each once, while nothing runs.

With Triton and without a GPU, the kernels are compiled for an H100 and launches fail, so that what is launched is seen.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tensorweave.kernels.compile_ahead import _PARSING, compile_ahead  # noqa: E402
from tests.workers.waiting import WAIT_S  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreter compiles nothing"),
]


@triton.jit(do_not_specialize=["count"])
def double(x_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < count) * 2, mask=i < count)


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.no_such_thing)


class CompilingDriver:
    """A GPU that is only compiled for."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    for kernel in (double, wrong):
        kernel.device_caches.clear()
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    monkeypatch.setattr(triton.runtime.driver, "_active", CompilingDriver())
    yield torch.device("cpu")
    for kernel in (double, wrong):
        kernel.device_caches.clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels in the order in which they are compiled or read from the disk."""
    names: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, repr, **_: names.append(repr))
    return names


def launch(x: Tensor, out: Tensor, block: int) -> None:
    double[(triton.cdiv(len(x), block),)](x, out, len(x), BLOCK=block)


def test_each_kind_of_launch_is_compiled_once_and_nothing_runs(device: torch.device, compiled: list[str]) -> None:
    x, out = torch.arange(100.0, device=device), torch.full((100,), -1.0, device=device)
    told: list[float] = []

    def step() -> None:
        for count in (100, 50, 3):
            launch(x[:count], out, 32)
        launch(x, out, 64)
        launch(x[:-1], out[1:], 64)  # of another alignment
        launch(x.half(), out.half(), 32)

    assert compile_ahead(lambda: [step() for _ in range(3)], num_threads=4, on_progress=told.append) == 4
    assert len(compiled) == 4
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert out.eq(-1.0).all()
    assert compile_ahead(step) == 0
    if device.type == "cuda":
        step()
        launch(x, out, 32)
        assert torch.equal(out, 2 * x)
    assert len(compiled) == 4


def test_one_thread_parses_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, parse, was_alone = torch.arange(100.0, device=device), JITFunction.parse, list[bool]()

    def watched(kernel: JITFunction[Any]) -> Any:
        was_alone.append(_PARSING.locked())
        return parse(kernel)

    monkeypatch.setattr(JITFunction, "parse", watched)
    assert compile_ahead(lambda: [launch(x, x.clone(), block) for block in (32, 64)], num_threads=2) == 2
    assert was_alone
    assert all(was_alone)
    assert JITFunction.parse is watched


def test_a_parse_that_another_one_has_spoilt_is_tried_again(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, parse, kernels = torch.arange(100.0, device=device), JITFunction.parse, list[Any]()

    def spoilt_at_first(kernel: JITFunction[Any]) -> Any:
        kernels.append(kernel)
        if len(kernels) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=39, after=59)")
        return parse(kernel)

    monkeypatch.setattr(JITFunction, "parse", spoilt_at_first)
    assert compile_ahead(lambda: launch(x, x.clone(), 128)) == 1
    assert kernels[0] is kernels[1]


def test_two_may_compile_at_the_same_time(device: torch.device) -> None:
    x, counts, parse, run = torch.arange(100.0, device=device), list[int](), JITFunction.parse, JITFunction.run

    def compile_own(block: int) -> None:
        counts.append(compile_ahead(lambda: launch(x, x.clone(), block), num_threads=1))

    threads = [threading.Thread(target=compile_own, args=(block,), daemon=True) for block in (16, 256)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert counts == [1, 1]
    assert (JITFunction.parse, JITFunction.run) == (parse, run)


def test_launches_of_other_threads_go_on(device: torch.device) -> None:
    x, out = torch.arange(100.0, device=device), torch.full((100,), -1.0, device=device)
    results: list[BaseException | None] = []

    def launch_elsewhere() -> None:
        try:
            launch(x, out, 128)
        except AttributeError as error:  # there is no GPU to launch it on
            results.append(error)
        else:
            results.append(None)

    def step() -> None:
        other = threading.Thread(target=launch_elsewhere)
        other.start()
        other.join(60)

    assert compile_ahead(step) == 0
    assert len(results) == 1
    if device.type == "cuda":
        assert torch.equal(out, 2 * x)
    else:
        assert "CompilingDriver" in str(results[0])


def test_a_kernel_that_cannot_be_compiled_is_told_and_leaves_nothing_behind(device: torch.device) -> None:
    x = torch.arange(64.0, device=device)
    run = triton.runtime.jit.JITFunction.run
    with pytest.raises(triton.CompilationError, match="no_such_thing"):
        compile_ahead(lambda: wrong[(1,)](x, BLOCK=64))
    assert triton.runtime.jit.JITFunction.run is run
    assert compile_ahead(lambda: launch(x, x, 16)) == 1


def test_a_second_process_finds_the_kernels_on_disk(device: torch.device, tmp_path: Path) -> None:
    x = torch.arange(64.0, device=device)
    assert compile_ahead(lambda: launch(x, x, 16)) == 1
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("double*")}
    assert files
    double.device_caches.clear()  # as in a new process
    assert compile_ahead(lambda: launch(x, x, 16)) == 1
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("double*")} == files
