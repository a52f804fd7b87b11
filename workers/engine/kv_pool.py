"""`KVPool`: the memory behind the KV blocks of one rank, for all layers.

The KV manager says who holds which block; the engine and the transfer layer touch the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tensorweave.workers.engine.memory_ahead import MemoryAhead, NotAhead
from tensorweave.workers.step.resources import BlockCopy


class KVPool:
    """Blocks of P tokens, every layer's keys and values, in one tensor.

    cache  [layers, blocks, planes, P tokens, head_dim]
                            │
                            ├── planes 0 … K-1:    keys of KV heads 0 … K-1 (of this rank)
                            └── planes K … 2K-1:   values of the same heads

    one plane of one block, P * head_dim numbers, is contiguous: the unit of a head-range transfer;
    one block of one layer, 2 * K planes, is contiguous too.

    `first_head` is the number, in the model, of this rank's KV head 0. An engine tells `memory` which blocks it has
    come to.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        tokens_per_block: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        first_head: int = 0,
    ) -> None:
        self.first_head = first_head
        shape = (num_layers, num_blocks, 2 * num_kv_heads, tokens_per_block, head_dim)
        self.cache = _zeros(shape, dtype, device)
        self.layers: tuple[Tensor, ...] = tuple(self.cache.unbind(0))
        self.memory: MemoryAhead | NotAhead = MemoryAhead(self.cache) if device.type == "cpu" else NotAhead()

    @property
    def num_blocks(self) -> int:
        return self.cache.shape[1]

    @property
    def tokens_per_block(self) -> int:
        return self.cache.shape[3]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy in order: a block may be written by one copy and read by the next."""
        for copy in copies:
            self.cache[:, copy.target, :, : copy.num_tokens] = self.cache[:, copy.source, :, : copy.num_tokens]

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        """What was computed there may be NaN, which must not be left in memory (see `_zeros`)."""
        self.cache.view(torch.uint8)[:, list(block_ids)] = 0


def block_bytes(num_layers: int, num_kv_heads: int, tokens_per_block: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return num_layers * 2 * num_kv_heads * tokens_per_block * head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked key still meets its weight 0, and 0 times a NaN left in memory is NaN.

    On a CPU numpy gets them from calloc: pages cost nothing until a block is used, or soon will be (`MemoryAhead`).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
