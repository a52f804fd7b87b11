"""`KvSlots`: where a step's keys and values go in a layer's cache. Made once per step, by the attention plan."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tensorweave.kernels.weights import FP8, to_fp8

# T tokens, B blocks, C = 2 K planes of a block (the keys of K heads, then their values), P tokens per block, H head dim


class KvSlots:
    """`slots_T` has a slot for each token: block * P + offset."""

    def __init__(self, slots_T: Tensor, num_planes: int, tokens_per_block: int) -> None:
        self.slots_T = slots_T
        self._num_planes = num_planes
        self._tokens_per_block = tokens_per_block

    @cached_property
    def rows(self) -> Tensor:
        """[T * C]: the numbers of the rows of H in a cache [B * C * P, H]. The native kernels do not use them."""
        P, C = self._tokens_per_block, self._num_planes
        first_T1 = (self.slots_T // P * (C * P) + self.slots_T % P).unsqueeze(1)
        return (first_T1 + torch.arange(0, C * P, P, device=self.slots_T.device)).flatten()

    def write(self, kv_TCH: Tensor, cache_BCPH: Tensor) -> None:
        """Put each token's keys and values into its slot of one layer's cache."""
        if cache_BCPH.dtype == FP8:  # torch 2.11 copies its bytes, but not its numbers, by index
            kv_TCH, cache_BCPH = to_fp8(kv_TCH).view(torch.uint8), cache_BCPH.view(torch.uint8)
        H = cache_BCPH.shape[-1]
        cache_BCPH.view(-1, H).index_copy_(0, self.rows, kv_TCH.reshape(-1, H))
