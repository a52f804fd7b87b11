"""Counts the KV blocks for which a rank has memory, once its weights are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import torch

from tensorweave.cluster.host_memory import host_memory
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.workers.engine.device_memory import GIB, CudaMemory, DeviceMemory

logger = logging.getLogger(__name__)

_MARGIN: Final = 256 << 20
"""Bytes of a GPU that stay free for the driver, for what libraries allocate late, and for fragmentation."""


@dataclass(frozen=True, slots=True)
class KvMemory:
    """`share` is what a rank's KV cache may take of the bytes that are `free`; `kept` were taken off before, for
    steps."""

    share: int
    free: int
    kept: int = 0

    @classmethod
    def of_host(cls, kv: KvCacheConfig) -> KvMemory:
        available = host_memory().available
        return cls(int(available * kv.cpu_memory_fraction), available)

    @classmethod
    def of_device(cls, kv: KvCacheConfig, memory: DeviceMemory, reserved_bytes: int) -> KvMemory:
        memory.settle()
        kept = reserved_bytes + _MARGIN
        free = max(0, memory.free - kept)
        return cls(int(free * kv.free_gpu_memory_fraction), free, kept)


def count_blocks(kv: KvCacheConfig, block_bytes: int, device: torch.device, reserved_bytes: int) -> int:
    """As many as `max_tokens` needs if it is given, else as many as the configured fraction of memory holds.

    Args:
        block_bytes: of one block on this rank, all layers.
        reserved_bytes: left free on a GPU for the largest step and for CUDA graphs: see `device_memory`.

    Raises:
        ValueError: they do not fit; the message says how many tokens would.
    """
    is_host = device.type == "cpu"
    memory = KvMemory.of_host(kv) if is_host else KvMemory.of_device(kv, CudaMemory(device), reserved_bytes)
    num_blocks = fit_blocks(kv, block_bytes, memory)
    logger.info(
        "KV cache: %d tokens, %.2f GiB; %.2f GiB are free, and %.2f GiB are kept for steps and CUDA graphs",
        num_blocks * kv.tokens_per_block,
        num_blocks * block_bytes / GIB,
        memory.free / GIB,
        memory.kept / GIB,
    )
    return num_blocks


def fit_blocks(kv: KvCacheConfig, block_bytes: int, memory: KvMemory) -> int:
    """`count_blocks`, of this memory."""
    if kv.max_tokens is None:
        num_blocks = memory.share // block_bytes
        if num_blocks < 1:
            raise ValueError(
                f"no memory for a KV cache: one block takes {block_bytes} bytes, this rank's share is {memory.share}"
                f"{_kept_for_steps(memory)}"
            )
        return num_blocks
    num_blocks = -(-kv.max_tokens // kv.tokens_per_block)
    if num_blocks * block_bytes > memory.free:
        raise ValueError(
            f"kv_cache_config.max_tokens is {kv.max_tokens}, which takes {num_blocks * block_bytes / GIB:.2f} GiB a "
            f"rank; {memory.free / GIB:.2f} GiB are free, enough for "
            f"{memory.free // block_bytes * kv.tokens_per_block} tokens{_kept_for_steps(memory)}"
        )
    return num_blocks


def _kept_for_steps(memory: KvMemory) -> str:
    if not memory.kept:
        return ""
    return (
        f"; {memory.kept / GIB:.2f} GiB are kept for steps and CUDA graphs: a lower max_num_tokens, max_batch_size or "
        "cuda_graph_config.max_batch_size needs less"
    )
