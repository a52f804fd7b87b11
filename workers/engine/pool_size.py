"""Counts the KV blocks for which a rank has memory, once its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensorweave.cluster.host_memory import host_memory
from tensorweave.cluster.llm_args import KvCacheConfig

_GIB = 1 << 30


def count_blocks(kv: KvCacheConfig, block_bytes: int, device: torch.device, activation_bytes: int) -> int:
    """As many as `max_tokens` needs if it is given, else as many as the configured fraction of memory holds.

    Args:
        activation_bytes: left free for a step's temporaries, on a GPU.

    Raises:
        ValueError: they do not fit; the message says how many tokens would.
    """
    memory = _free_memory(kv, device, activation_bytes)
    if kv.max_tokens is None:
        num_blocks = memory.share // block_bytes
        if num_blocks < 1:
            raise ValueError(
                f"no memory for a KV cache: one block takes {block_bytes} bytes, this rank's share is {memory.share}"
            )
        return num_blocks
    num_blocks = -(-kv.max_tokens // kv.tokens_per_block)
    if num_blocks * block_bytes > memory.free:
        raise ValueError(
            f"kv_cache_config.max_tokens is {kv.max_tokens}, which takes {num_blocks * block_bytes / _GIB:.2f} GiB a "
            f"rank; {memory.free / _GIB:.2f} GiB are free, enough for "
            f"{memory.free // block_bytes * kv.tokens_per_block} tokens"
        )
    return num_blocks


@dataclass(frozen=True, slots=True)
class _Memory:
    """`share` is what this rank's KV cache may take of the bytes that are `free`."""

    share: int
    free: int


def _free_memory(kv: KvCacheConfig, device: torch.device, activation_bytes: int) -> _Memory:
    if device.type == "cpu":
        available = host_memory().available
        return _Memory(int(available * kv.cpu_memory_fraction), available)
    free = max(0, torch.cuda.mem_get_info(device)[0] - activation_bytes)
    return _Memory(int(free * kv.free_gpu_memory_fraction), free)
