from __future__ import annotations

import math
import mmap
import resource
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine.memory_ahead import AHEAD_BYTES, MemoryAhead

LAYERS = 3
BLOCK_BYTES = 64 << 10
AHEAD = AHEAD_BYTES // BLOCK_BYTES


class Kernel:
    """What was asked of it, as blocks of each layer."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = torch.zeros(LAYERS, num_blocks, BLOCK_BYTES, dtype=torch.uint8)
        self.given: list[set[int]] = [set() for _ in range(LAYERS)]
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.error: OSError | None = None

    def populate(self, address: int, num_bytes: int) -> None:
        assert self.may_go_on.wait(60)
        if self.error is not None:
            raise self.error
        first, num_blocks = (address - self.cache.data_ptr()) // BLOCK_BYTES, num_bytes // BLOCK_BYTES
        assert num_blocks * BLOCK_BYTES == num_bytes
        for place in range(first, first + num_blocks):
            self.given[place // self.cache.shape[1]].add(place % self.cache.shape[1])

    def given_up_to(self, stop: int) -> bool:
        return all(blocks == set(range(stop)) for blocks in self.given)


def reach_until(memory: MemoryAhead, block: int, is_given: Callable[[], bool]) -> None:
    """As steps do."""
    end_s = time.monotonic() + 60
    while not is_given():
        assert time.monotonic() < end_s
        memory.reach(block)
        time.sleep(0.005)


def test_the_first_blocks_have_their_memory_at_once() -> None:
    kernel = Kernel(3 * AHEAD)
    MemoryAhead(kernel.cache, kernel.populate)
    assert kernel.given_up_to(AHEAD)


def test_a_small_pool_has_all_of_it() -> None:
    kernel = Kernel(5)
    memory = MemoryAhead(kernel.cache, kernel.populate)
    assert kernel.given_up_to(5)
    kernel.error = OSError("not asked again")
    memory.reach(4)


def test_more_follows_when_half_of_it_is_used_up_to_the_last_block() -> None:
    kernel = Kernel(2 * AHEAD)
    memory = MemoryAhead(kernel.cache, kernel.populate)
    memory.reach(AHEAD // 2 - 1)
    assert kernel.given_up_to(AHEAD)
    reach_until(memory, AHEAD // 2, lambda: kernel.given_up_to(AHEAD // 2 + 1 + AHEAD))
    reach_until(memory, AHEAD + AHEAD // 2, lambda: kernel.given_up_to(2 * AHEAD))


def test_steps_do_not_wait_and_what_they_have_come_to_is_left_out() -> None:
    kernel = Kernel(4 * AHEAD)
    memory = MemoryAhead(kernel.cache, kernel.populate)
    kernel.may_go_on.clear()
    memory.reach(AHEAD)
    memory.reach(2 * AHEAD)  # the thread waits, and there is one at most
    kernel.may_go_on.set()
    without = set(range(2 * AHEAD + 1)) - {AHEAD}
    reach_until(memory, AHEAD, lambda: all(blocks == without for blocks in kernel.given))


def test_a_kernel_that_cannot_is_asked_once() -> None:
    kernel = Kernel(2 * AHEAD)
    kernel.error = OSError("Linux 4")
    memory = MemoryAhead(kernel.cache, kernel.populate)
    kernel.error = None
    memory.reach(AHEAD)
    assert kernel.given_up_to(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives memory ahead")
def test_no_page_of_the_first_blocks_is_new_to_the_kernel() -> None:
    shape = (LAYERS, 16 * AHEAD, 2, 2, 32, 64)
    fresh = mmap.mmap(-1, 4 * math.prod(shape))  # an allocator may return pages that were written before
    cache = torch.frombuffer(fresh, dtype=torch.float32).view(shape)
    MemoryAhead(cache)
    middle = slice(cache.shape[1] // 2, cache.shape[1] // 2 + 8)
    num_faults_of_writing(cache[:, :1])  # its own first use
    assert num_faults_of_writing(cache[:, :8]) < LAYERS
    assert num_faults_of_writing(cache[:, middle]) >= LAYERS  # a huge page of each layer at least
    assert cache[:, 8 : middle.start].count_nonzero() == 0


def test_a_pool_on_a_cpu_has_its_first_memory() -> None:
    pool = KVPool(LAYERS, 16 * AHEAD, 2, 32, 64, torch.float32, torch.device("cpu"))
    assert isinstance(pool.memory, MemoryAhead)


def num_faults_of_writing(memory: Tensor) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    memory.numpy()[...] = 1  # on this thread
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
