"""A small pool of random blocks, and its packed bytes."""

from __future__ import annotations

import torch

from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.transfer.window import PoolWindow


def random_window(num_heads: int = 3, first_head: int = 0, dtype: torch.dtype = torch.bfloat16) -> PoolWindow:
    pool = KVPool(2, 8, num_heads, 4, 6, dtype, torch.device("cpu"), first_head)
    pool.cache.copy_(torch.randn(pool.cache.shape, generator=torch.Generator().manual_seed(1)))
    return PoolWindow(pool)


def packed(window: PoolWindow, block_ids: list[int], heads: range) -> torch.Tensor:
    out = window.new_staging(len(block_ids) * window.block_bytes(len(heads)))
    window.pack(block_ids, heads, out)
    return out
