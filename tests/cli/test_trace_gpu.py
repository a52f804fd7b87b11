"""A trace of replayed CUDA graphs against events of the device."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from tensorweave.cli.suite_rates import measure_rates
from tensorweave.cli.trace_events import last_part
from tensorweave.cli.trace_figures import device_steps
from tensorweave.cli.trace_profiler import prepare, recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NUM_STEPS = 100
PAUSE_S = 300e-6


def captured(num_products: int) -> torch.cuda.CUDAGraph:
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        x = a
        for _ in range(num_products):
            x = x @ a
        return x.argmax(-1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def replay(graph: torch.cuda.CUDAGraph, pause_s: float) -> None:
    """Each step ends before the host pauses, and the next one starts after it."""
    done = torch.cuda.Event()
    for _ in range(NUM_STEPS):
        graph.replay()
        done.record()
        done.synchronize()
        pause_ends_s = time.perf_counter() + pause_s
        while time.perf_counter() < pause_ends_s:
            pass


def busy_us_by_events(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(NUM_STEPS):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / NUM_STEPS


def test_steps_of_a_graph_on_another_thread(tmp_path: Path) -> None:
    prepare()
    graph = captured(num_products=40)
    busy_us = busy_us_by_events(graph)
    with recording(tmp_path / "trace.json") as trace:
        began_s = time.perf_counter()
        thread = threading.Thread(target=replay, args=(graph, PAUSE_S))
        thread.start()
        thread.join()
        took_s = time.perf_counter() - began_s
    steps, shares = device_steps(last_part(trace.events, took_s), NUM_STEPS)
    assert steps.num_steps == pytest.approx(NUM_STEPS * 0.9, abs=3)
    assert steps.busy_us + steps.inside_us == pytest.approx(busy_us, rel=0.15)
    assert steps.between_us > PAUSE_S * 1e6
    assert sum(share.per_step for share in shares) == pytest.approx(41, abs=2)  # the products and the argmax


def test_rates_of_a_gpu() -> None:
    rates = measure_rates("cuda", "bfloat16", "bfloat16")
    copy = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copy.clone()
    start.record()
    copy.clone()
    stop.record()
    stop.synchronize()
    assert rates.read_bytes > 0.9 * 2 * copy.nbytes / (start.elapsed_time(stop) / 1e3), "slower than a copy"
    assert rates.operations > rates.read_bytes * 50
