"""`RankWeights`: one rank's weights as a model asks for them while it is built.

Read from a checkpoint (`loader`), from an engine directory (`engine_dir.rank_file`), or without memory
(`MetaWeights`), to find out what a model asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.weights import Weight


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Some rows of the checkpoint's tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    rows: range


class RankWeights(Protocol):
    """Names and whole shapes are those of the checkpoint."""

    def vector(self, name: str, size: int) -> Tensor:
        """All of a norm's weight or of a bias."""
        ...

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        """Rows of several matrices (or biases), one below the other."""
        ...

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        """The same, to multiply with."""
        ...

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        """Columns of one matrix, to multiply with."""
        ...

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        """The rank's rows of the embedding, to multiply with."""
        ...


class MetaWeights:
    """Tensors of torch's meta device, which have no memory, and a record of what was asked for.

    `shapes` are the whole tensors; `num_multiplied` and `num_looked_up` count the elements of matrices that the rank
    keeps. Norms and biases are not counted.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.num_multiplied = 0
        self.num_looked_up = 0

    def vector(self, name: str, size: int) -> Tensor:
        self.shapes[name] = (size,)
        return _meta((size,))

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        shape = self._note(parts)
        self.num_looked_up += prod(shape) if len(shape) > 1 else 0
        return _meta(shape)

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Tensor:
        shape = self._note(parts)
        self.num_multiplied += prod(shape)
        return _meta(shape)

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Tensor:
        self.shapes[name] = shape
        self.num_multiplied += shape[0] * len(columns)
        return _meta((shape[0], len(columns)))

    def tied_head(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD

    def _note(self, parts: Sequence[TensorRows]) -> tuple[int, ...]:
        self.shapes |= {part.name: part.shape for part in parts}
        return stacked_shape(parts)


def stacked_shape(parts: Sequence[TensorRows]) -> tuple[int, ...]:
    """Of all parts, one below the other."""
    return (sum(len(part.rows) for part in parts), *parts[0].shape[1:])


def _meta(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")
