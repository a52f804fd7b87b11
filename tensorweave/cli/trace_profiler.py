"""torch's profiler over all threads of this process, set up so that it costs little: kernels and CUDA calls on a GPU,
operators on a CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from tensorweave.cli.trace_events import Trace


def has_gpu() -> bool:
    return torch.cuda.is_available()


def prepare() -> None:
    """Load the profiler before CUDA graphs are captured and before anything is timed; the first use takes seconds."""
    # CUPTI must stay loaded between traces: it cannot be loaded again under CUDA graphs (pytorch/pytorch#75504).
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with tempfile.TemporaryDirectory() as folder, recording(Path(folder) / "trace.json"):
        torch.ones(8, device="cuda" if has_gpu() else "cpu").sum()


@contextmanager
def recording(path: Path) -> Iterator[Trace]:
    """Write a Chrome trace of what runs meanwhile to `path`; the object has its events afterwards."""
    trace = Trace()
    if has_gpu():
        profiler = profile(activities=[ProfilerActivity.CUDA])
    else:
        config = _ExperimentalConfig(profile_all_threads=True)
        profiler = profile(activities=[ProfilerActivity.CPU], experimental_config=config)
    profiler.start()
    try:
        yield trace
    finally:
        profiler.stop()
    profiler.export_chrome_trace(str(path))
    trace.read(path)
