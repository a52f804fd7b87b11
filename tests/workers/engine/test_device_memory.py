"""What steps and graphs take of a device's memory, measured on a device of numbers."""

from __future__ import annotations

import pytest
import torch

from tensorweave.workers.engine.device_memory import (
    CudaMemory,
    measure_graph_memory,
    measure_step_memory,
    naming_knobs,
)
from tests.workers.memory_of_numbers import MIB, MemoryOfNumbers


def test_a_step_counts_with_what_it_gives_back() -> None:
    memory = MemoryOfNumbers(free=1000, reserved=100)

    def step() -> None:
        memory.allocate(50)  # a workspace that stays
        memory.allocate(300)
        memory.release(200)
        memory.allocate(150)
        memory.release(250)

    assert measure_step_memory(step, memory) == 300
    assert (memory.free, memory.reserved) == (950, 150)


def test_memory_that_was_held_unused_does_not_hide_a_step() -> None:
    memory = MemoryOfNumbers(free=1000, reserved=0)
    memory.allocate(500)
    memory.release(500)
    assert measure_step_memory(lambda: (memory.allocate(20), memory.release(20)), memory) == 20


def test_graphs_are_counted_from_the_largest_and_a_few_others() -> None:
    memory = MemoryOfNumbers(free=1000 * MIB, reserved=0)
    captured: list[int] = []

    def capture(size: int) -> object:
        captured.append(size)
        memory.take(60 * MIB if len(captured) == 1 else 3 * MIB)
        return size

    sizes = (1, 2, 4, 8, 16, 24, 32)
    assert measure_graph_memory(capture, sizes, memory) == 60 * MIB + 6 * 3 * MIB
    assert captured == [32, 24, 16, 8]


def test_a_single_graph_and_none() -> None:
    memory = MemoryOfNumbers(free=100, reserved=0)
    assert measure_graph_memory(lambda _: memory.take(7), [8], memory) == 7
    assert measure_graph_memory(lambda _: memory.take(7), [], memory) == 0
    assert measure_graph_memory(lambda _: memory.take(-7), [1, 8], memory) == 0  # another process has ended meanwhile


def test_too_little_memory_is_told_with_the_knobs() -> None:
    def step(*_size: int) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB. If reserved but unallocated memory is large, x")

    memory = MemoryOfNumbers(free=0, reserved=0)
    step_words = "not enough GPU memory for the largest step: lower max_num_tokens or max_batch_size. Tried to allocate"
    with pytest.raises(ValueError, match=step_words) as caught:
        measure_step_memory(step, memory)
    assert str(caught.value).endswith("2.00 GiB.")
    with pytest.raises(ValueError, match=r"for CUDA graphs: lower cuda_graph_config\.max_batch_size"):
        measure_graph_memory(step, [4], memory)
    with pytest.raises(KeyError), naming_knobs("a thing", "a knob"):
        raise KeyError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured() -> None:
    memory = CudaMemory(torch.device("cuda", torch.cuda.current_device()))
    numbers = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    measured = measure_step_memory(lambda: [numbers + i for i in range(3)], memory)
    assert 3 * 64 * MIB <= measured <= 4 * 64 * MIB
    graphs: list[torch.cuda.CUDAGraph] = []

    def capture(size: int) -> object:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            kept = numbers.repeat(2) + size
        graphs[-1].replay()
        return kept

    assert 256 * MIB * 3 <= measure_graph_memory(capture, [1, 2, 4], memory) <= 900 * MIB
