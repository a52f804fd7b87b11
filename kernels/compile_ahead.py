"""Compiles the Triton kernels of a step in parallel before its first run; called once, while an engine warms up.

Triton compiles a kernel when it is first launched, 0.2 to 1 s each, one after the other. Here a step is called without
launching anything, so that Triton is handed all kernels at once (its `AsyncCompileMode`). Compiled kernels are kept in
Triton's cache on disk (`TRITON_CACHE_DIR`, by default ~/.triton/cache), where the next start finds them.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
import triton
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tensorweave.kernels.kernel_cache import ensure_kernel_cache

_ALIGNMENT: Final = 16
_ONE_AT_A_TIME: Final = threading.Lock()
_PARSING: Final = threading.Lock()
"""Python 3.11's `ast.parse` fails where two are in it at once: "AST constructor recursion depth mismatch"."""
_MOST_TRIES: Final = 10
"""Of a parse: the garbage collector may run within it, and a finalizer that prints a traceback parses too."""


def compile_ahead(
    call_steps: Callable[[], object],
    *,
    num_threads: int | None = None,
    on_progress: Callable[[float], object] = lambda share: None,
) -> int:
    """Compile all Triton kernels that `call_steps` would launch, and return how many were not in this process yet.

    Args:
        call_steps: called once, on this thread. None of its Triton kernels runs, so that what torch does in between
            reads what is in the buffers.
        num_threads: kernels that are compiled at a time. Default: one per core.
        on_progress: told the share of the kernels that are done.

    Raises:
        triton.CompilationError: of the first kernel that cannot be compiled.
    """
    ensure_kernel_cache()
    # In a context of its own: a mode that is left by an error stays active in it.
    num_threads = num_threads or len(os.sched_getaffinity(0))
    return contextvars.copy_context().run(_compile, call_steps, num_threads, on_progress)


def _compile(call_steps: Callable[[], object], num_threads: int, on_progress: Callable[[float], object]) -> int:
    with (
        _ONE_AT_A_TIME,
        _parsing_alone(),
        ThreadPoolExecutor(num_threads, "compile") as executor,
        triton.AsyncCompileMode(executor) as mode,
    ):
        with _launching_nothing():
            call_steps()
        total = len(mode.raw_futures)
        for done, _ in enumerate(as_completed(mode.raw_futures), 1):
            on_progress(done / total)
    return total


@contextmanager
def _parsing_alone() -> Iterator[None]:
    parse = JITFunction.parse

    def parse_alone(kernel: Any) -> Any:
        with _PARSING:
            for _ in range(_MOST_TRIES - 1):
                with suppress(SystemError):
                    return parse(kernel)
            return parse(kernel)

    JITFunction.parse = parse_alone
    try:
        yield
    finally:
        JITFunction.parse = parse


@contextmanager
def _launching_nothing() -> Iterator[None]:
    """On this thread, launches only see to it that their kernel is compiled, each kind of launch once."""
    run, this_thread, seen = JITFunction.run, threading.get_ident(), set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != this_thread:
            return run(kernel, *args, grid=grid, warmup=warmup, **options)
        kind = (kernel, *map(_kind, args), *((name, _kind(value)) for name, value in options.items()))
        if kind not in seen:
            seen.add(kind)
            run(kernel, *args, grid=grid, warmup=True, **options)
        return None

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def _kind(value: Any) -> Any:
    """What Triton compiles for, of an argument: equal kinds have the same kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return float if isinstance(value, float) else value
