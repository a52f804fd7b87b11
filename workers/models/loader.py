"""`WeightLoader`: reads one rank's share of a checkpoint.

Rows of fused matrices are read straight into their final place, so that loading needs a rank's share of memory and one
slice besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.workers.models.checkpoint import WeightSource
from tensorweave.workers.models.rank_weights import TensorRows, stacked_shape


@dataclass(frozen=True, slots=True)
class WeightLoader:
    """Reads parts of a checkpoint's tensors into place on one device, in one dtype."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device

    def vector(self, name: str, size: int) -> Tensor:
        return self.source.read(name, slice(0, size)).to(self.device, self.dtype)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        stacked = torch.empty(stacked_shape(parts), dtype=self.dtype, device=self.device)
        start = 0
        for part in parts:
            stop = start + len(part.rows)
            stacked[start:stop].copy_(self.source.read(part.name, slice(part.rows.start, part.rows.stop)))
            start = stop
        return stacked

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self.rows(parts)

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Tensor:
        matrix = torch.empty(shape[0], len(columns), dtype=self.dtype, device=self.device)
        return matrix.copy_(self.source.read(name, slice(0, shape[0]), slice(columns.start, columns.stop)))

    def tied_head(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD
