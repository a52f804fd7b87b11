"""Measures what steps and CUDA graphs take of a GPU's memory, before the KV cache takes the rest.

Called while an engine is built: with the weights in place and a KV cache of a few blocks, the largest step is run and
some graphs are captured. `pool_size` then counts the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import torch

_SAMPLED_GRAPHS: Final = 4
GIB: Final = 1 << 30
GRAPH_KNOBS: Final = "cuda_graph_config.max_batch_size (or set cuda_graph_config to null)"


class DeviceMemory(Protocol):
    """A device's memory in bytes, as its driver and torch's allocator report it."""

    @property
    def free(self) -> int:
        """What any process could still take."""
        ...

    @property
    def reserved(self) -> int:
        """What this process's allocator has taken from the device, used or not."""
        ...

    @property
    def peak_reserved(self) -> int:
        """The most that was reserved since `restart_peak`."""
        ...

    def restart_peak(self) -> None: ...

    def settle(self) -> None:
        """Wait for the device, then give back what the allocator holds unused."""
        ...


class CudaMemory:
    """The memory of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    @property
    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    @property
    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def measure_step_memory(run_step: Callable[[], object], memory: DeviceMemory) -> int:
    """Bytes that `run_step`, the largest step there can be, takes only while it runs.

    What it leaves allocated (workspaces, loaded kernels) is no longer free afterwards and is not counted here.

    Raises:
        ValueError: there is not enough memory for the step; the message names the knobs.
    """
    memory.settle()
    memory.restart_peak()
    with naming_knobs("the largest step", "max_num_tokens or max_batch_size"):
        run_step()
        memory.settle()
    return max(0, memory.peak_reserved - memory.reserved)


def measure_graph_memory(capture: Callable[[int], object], sizes: Sequence[int], memory: DeviceMemory) -> int:
    """Bytes that the graphs of all batch `sizes` will take: the largest, and for each other one the mean of a few.

    Args:
        capture: captures the graph of a batch size, replays it once (the driver takes memory for a graph when it first
            runs) and returns what keeps it.

    Raises:
        ValueError: there is not enough memory for the graphs that were tried; the message names the knobs.
    """
    if not sizes:
        return 0
    largest, *others = sorted(sizes, reverse=True)
    kept = []
    with naming_knobs("CUDA graphs", GRAPH_KNOBS):
        memory.settle()
        free = [memory.free]
        for batch in ([largest], others[: _SAMPLED_GRAPHS - 1]):
            kept += [capture(size) for size in batch]
            memory.settle()
            free.append(memory.free)
    num_sampled = len(kept) - 1
    each = math.ceil(max(0, free[1] - free[2]) / num_sampled) if num_sampled else 0
    return max(0, free[0] - free[1]) + len(others) * each


@contextmanager
def naming_knobs(purpose: str, knobs: str) -> Iterator[None]:
    """Raises ValueError, which names the arguments to lower, where torch finds no memory for `purpose`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(" If reserved but unallocated")[0]
        raise ValueError(f"not enough GPU memory for {purpose}: lower {knobs}. {reason}") from error
