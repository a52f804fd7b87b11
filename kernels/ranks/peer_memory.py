"""`PeerMemory`: memory of a rank's GPU that the other ranks of its host read and write; and whether one is silent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_ALIGNMENT: Final = 256


class PeerMemory:
    """Every rank takes the same parts in the same order, so that they lie at the same places.

    Args:
        memory_E: uint8; this rank's, zeros at first.
        addresses: of all ranks' memories in rank order, as this process reaches them.
        limit_s: how long a kernel waits for another rank.
        mapped: what keeps the others' memories mapped.
    """

    def __init__(
        self, memory_E: Tensor, addresses: Sequence[int], rank: int, limit_s: float, mapped: Sequence[object] = ()
    ) -> None:
        assert addresses[rank] == memory_E.data_ptr()
        self.addresses = tuple(addresses)
        self.rank = rank
        self.limit_ns = int(limit_s * 1e9)
        self.fault = torch.zeros(1, dtype=torch.int32, device=memory_E.device)
        self.host_fault = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._memory_E = memory_E
        self._mapped = tuple(mapped)
        self._num_taken = 0

    @property
    def device(self) -> torch.device:
        return self._memory_E.device

    @property
    def num_ranks(self) -> int:
        return len(self.addresses)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The next part of the memory, contiguous."""
        start, num_bytes = self._num_taken, math.prod(shape) * dtype.itemsize
        assert start + num_bytes <= self._memory_E.numel(), "the ranks' memory is too small"
        self._num_taken = start + padded(num_bytes)
        return self._memory_E[start : start + num_bytes].view(dtype).view(shape)

    def place_of(self, tensor: Tensor) -> int:
        """How many bytes behind the beginning of the memory a part, or a view of one, begins."""
        place = tensor.data_ptr() - self._memory_E.data_ptr()
        assert 0 <= place < self._memory_E.numel(), "not of the ranks' memory"
        return place

    def silent_rank(self) -> int | None:
        """The rank for which a kernel has waited in vain. What it and later ones have computed is of no use."""
        fault = int(self.host_fault.item())
        return None if fault == 0 else fault - 1


def padded(num_bytes: int) -> int:
    """How much of the memory a part of so many bytes takes."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
