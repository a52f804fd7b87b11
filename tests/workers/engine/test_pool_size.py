"""How many KV blocks a rank has: by its share of memory, or by `max_tokens`."""

from __future__ import annotations

import pytest

from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.workers.engine.pool_size import KvMemory, fit_blocks
from tests.workers.memory_of_numbers import MIB, MemoryOfNumbers

GIB = 1 << 30


def test_the_cache_takes_its_fraction_of_what_steps_leave() -> None:
    memory = KvMemory.of_device(KvCacheConfig(), MemoryOfNumbers(free=64 * GIB, reserved=0), 4 * GIB - 256 * MIB)
    assert memory == KvMemory(share=54 * GIB, free=60 * GIB, kept=4 * GIB)
    assert fit_blocks(KvCacheConfig(), 4 * MIB, memory) == 54 * 256
    assert fit_blocks(KvCacheConfig(), 4 * MIB + 1, memory) == 54 * 256 - 1


def test_what_the_allocator_holds_unused_counts_as_free() -> None:
    held = MemoryOfNumbers(free=10 * GIB, reserved=0)
    held.allocate(5 * GIB)
    held.release(5 * GIB)
    assert KvMemory.of_device(KvCacheConfig(), held, 0).free == 10 * GIB - 256 * MIB


def test_max_tokens_may_take_all_that_is_free_and_no_more() -> None:
    memory = KvMemory(share=0, free=100 * MIB, kept=GIB)
    assert fit_blocks(KvCacheConfig(max_tokens=3200), MIB, memory) == 100
    with pytest.raises(ValueError, match=r"max_tokens is 3201, which takes 0\.10 GiB a rank") as caught:
        fit_blocks(KvCacheConfig(max_tokens=3201), MIB, memory)
    told = str(caught.value)
    assert "enough for 3200 tokens; 1.00 GiB are kept for steps and CUDA graphs: a lower max_num_tokens" in told


@pytest.mark.parametrize("free", [0, GIB, 2 * GIB])
def test_no_room_for_a_single_block_is_told(free: int) -> None:
    memory = KvMemory.of_device(KvCacheConfig(), MemoryOfNumbers(free, reserved=0), 2 * GIB - 256 * MIB)
    with pytest.raises(ValueError, match=r"no memory for a KV cache: one block takes 1048576 bytes.* a lower max_num"):
        fit_blocks(KvCacheConfig(), MIB, memory)


def test_a_host_keeps_nothing_for_steps() -> None:
    memory = KvMemory.of_host(KvCacheConfig(cpu_memory_fraction=0.5))
    assert memory.kept == 0
    assert 0 < memory.share <= memory.free // 2
    with pytest.raises(ValueError, match=r"share is \d+$"):
        fit_blocks(KvCacheConfig(), memory.share + 1, memory)
