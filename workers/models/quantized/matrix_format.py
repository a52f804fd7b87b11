"""`MatrixFormat`: how a checkpoint that comes quantized keeps the matrix of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from tensorweave.kernels.weights import Weight
from tensorweave.workers.models.checkpoint import Shapes

# N outputs, K inputs, G groups of inputs

FLOATS: Final = ("F64", "F32", "F16", "BF16")
SCALES: Final = (*FLOATS, "F8_E8M0", "U8")
"""Types of scales. Bytes are exponents of 2 (e8m0)."""


class StoredTensors(Protocol):
    """A `WeightSource` that also tells types, in the names of safetensors."""

    @property
    def shapes(self) -> Shapes: ...

    @property
    def dtypes(self) -> Mapping[str, str]: ...

    def read(self, name: str, *index: slice) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """What one tensor must be. Several shapes and types may be right."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], *dtypes: str) -> Stored:
        return cls((shape,), dtypes)


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """The rows and columns that a rank keeps of the matrix of `module`, whose whole shape is [N, K]; it multiplies rows
    of `dtype`."""

    module: str
    shape: tuple[int, int]
    rows: range
    columns: range
    dtype: torch.dtype

    @property
    def is_whole_rows(self) -> bool:
        return self.columns == range(self.shape[1])

    @property
    def row_slice(self) -> slice:
        return slice(self.rows.start, self.rows.stop)

    @property
    def column_slice(self) -> slice:
        return slice(self.columns.start, self.columns.stop)


class MatrixFormat(Protocol):
    """`bits` is the size of one weight without its scales."""

    @property
    def bits(self) -> int: ...

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        """The tensors that make the matrix of `module`; None if the source keeps it as plain numbers."""
        ...

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        """Raises ValueError, with the tensor's name, where it cannot be kept exactly."""
        ...


def read_scales(source: StoredTensors, name: str, *index: slice) -> Tensor:
    """Read scales in float32. Bytes are exponents of 2: byte 127 is 1."""
    scales = source.read(name, *index)
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()
