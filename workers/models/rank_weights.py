"""`RankWeights`: one rank's weights as a model asks for them while it is built.

Read from a checkpoint (`loader`), from an engine directory (`engine_dir.rank_file`), or without memory
(`MetaWeights`), to find out what a model asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from tensorweave.kernels.weights import Weight
from tensorweave.workers.models.tensor_names import HEAD


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Some rows of the checkpoint's tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    rows: range


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """What a model asks for at once: parts that lie one below the other; of a matrix, perhaps only some columns."""

    parts: tuple[TensorRows, ...]
    columns: range | None = None

    @classmethod
    def of_vector(cls, name: str, size: int) -> Self:
        return cls((TensorRows(name, (size,), range(size)),))

    @classmethod
    def of_columns(cls, name: str, shape: tuple[int, int], columns: range) -> Self:
        is_whole = columns == range(shape[1])
        return cls((TensorRows(name, shape, range(shape[0])),), None if is_whole else columns)

    @property
    def shape(self) -> tuple[int, ...]:
        whole = stacked_shape(self.parts)
        return whole if self.columns is None else (whole[0], len(self.columns))


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

    `shapes` are the whole tensors, `requests` what was asked for, in order; `num_multiplied` (of it `num_in_head` the
    output head's) and `num_looked_up` count the elements of matrices that the rank keeps. Norms and biases are not
    counted.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.requests: list[WeightRequest] = []
        self.num_multiplied = 0
        self.num_in_head = 0
        self.num_looked_up = 0

    def vector(self, name: str, size: int) -> Tensor:
        return self._note(WeightRequest.of_vector(name, size))

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        rows = self._note(WeightRequest(tuple(parts)))
        self.num_looked_up += rows.numel() if rows.dim() > 1 else 0
        return rows

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Tensor:
        matrix = self._note(WeightRequest(tuple(parts)))
        self.num_multiplied += matrix.numel()
        self.num_in_head += matrix.numel() if parts[0].name == HEAD else 0
        return matrix

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Tensor:
        matrix = self._note(WeightRequest.of_columns(name, shape, columns))
        self.num_multiplied += matrix.numel()
        return matrix

    def tied_head(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD

    def _note(self, request: WeightRequest) -> Tensor:
        self.shapes |= {part.name: part.shape for part in request.parts}
        self.requests.append(request)
        return torch.empty(request.shape, device="meta")


def stacked_shape(parts: Sequence[TensorRows]) -> tuple[int, ...]:
    """The shape of all parts, one below the other."""
    return (sum(len(part.rows) for part in parts), *parts[0].shape[1:])
