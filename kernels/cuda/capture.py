"""`GraphCapture`: captures launches in CUDA graphs, and what that needs of the interpreter."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class GraphCapture:
    """Of graphs that share memory, because they run one after the other, on a stream of its own. Needs a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device

    def __call__(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """What `launch` launches, which must have run before: its kernels are compiled. What other threads do to the
        device meanwhile is not their error."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        return graph


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and not before the end: what the collector frees may belong to the device, which allows that
    at no time while it captures."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
