"""`RowParameters`: how the rows of a batch are sampled, in buffers of fixed address on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.sample.rule import GREATEST_TEMPERATURE, LEAST_TEMPERATURE, SamplingParameters
from tensorweave.workers.sampling.host_copies import HostCopies

# R rows, C rows that there is room for

_FIRST_ROOM: Final = 64
_MASK: Final = (1 << 64) - 1


class RowParameters:
    """`has_limits`: a row has min-p, top-k or top-p. Rows behind the last one are greedy."""

    def __init__(self, copies: HostCopies) -> None:
        self.has_limits = False
        self._copies = copies
        self._make_room(_FIRST_ROOM)

    def _make_room(self, num_rows: int) -> None:
        self._room = num_rows
        self._numbers = torch.zeros(6, num_rows, dtype=torch.int32, device=self._copies.device)

    @property
    def address(self) -> int:
        return self._numbers.data_ptr()

    def reserve(self, num_rows: int) -> None:
        """Have room for so many rows. What `of_rows` returned before keeps its buffers."""
        if num_rows > self._room:
            self._make_room(1 << (num_rows - 1).bit_length())

    def set(self, specs: Sequence[SamplingSpec], replaced_top_p: Mapping[int, float]) -> None:
        """Bring the parameters of these rows to the device. `replaced_top_p`, by row, counts in place of a spec's."""
        self.reserve(len(specs))
        R, host = len(specs), np.zeros((6, self._room), dtype=np.int32)
        seeds, floats = host[:2].reshape(-1).view(np.uint64), host.view(np.float32)
        seeds[:R] = np.array([spec.seed & _MASK for spec in specs], dtype=np.uint64)
        floats[2, :R] = [_temperature_of(spec) for spec in specs]
        floats[3, :R] = [spec.top_p for spec in specs]
        for row, top_p in replaced_top_p.items():
            floats[3, row] = top_p
        floats[4, :R] = [spec.min_p for spec in specs]
        host[5, :R] = [spec.top_k for spec in specs]
        is_random = floats[2, :R] > 0
        has_limit = (floats[3, :R] < 1) | (floats[4, :R] > 0) | (host[5, :R] > 0)
        self.has_limits = bool((is_random & has_limit).any())
        self._numbers.copy_(self._copies.to_device(host), non_blocking=True)

    def of_rows(self, position_R: Tensor) -> SamplingParameters:
        R = len(position_R)
        seeds_C, floats_6C = self._numbers[:2].view(-1).view(torch.int64), self._numbers.view(torch.float32)
        return SamplingParameters(
            temperature_R=floats_6C[2, :R],
            top_k_R=self._numbers[5, :R],
            top_p_R=floats_6C[3, :R],
            min_p_R=floats_6C[4, :R],
            seed_R=seeds_C[:R],
            position_R=position_R,
        )


def _temperature_of(spec: SamplingSpec) -> float:
    if spec.is_greedy or spec.top_k == 1:
        return 0.0
    return min(max(spec.temperature, LEAST_TEMPERATURE), GREATEST_TEMPERATURE)
