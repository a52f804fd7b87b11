"""Weights that are quantized matrix by matrix right after they were read, on the device where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from tensorweave.cluster.quant_config import IntegerWeights
from tensorweave.kernels.quantize_integers import quantize_integers
from tensorweave.kernels.weights import GroupedWeight, QuantizedWeight, Weight, quantize_weight
from tensorweave.workers.models.rank_weights import RankWeights, TensorRows
from tensorweave.workers.models.tensor_names import HEAD

_BITS_OF_HEAD: Final = 8


def quantizing(weights: RankWeights, quantization: str | None) -> RankWeights:
    """`quantization` is a name as `weight_quantization` returns it."""
    if quantization is None:
        return weights
    integers = IntegerWeights.parse(quantization)
    if integers is not None:
        return IntegerRankWeights(weights, integers)
    assert quantization == "fp8", quantization
    return QuantizingWeights(weights)


@dataclass(frozen=True, slots=True)
class QuantizingWeights:
    """In 8-bit floats. The output head is not quantized: its error would be that of the logits.

    Matrices that come quantized, as those of engine directories do, pass as they are.
    """

    weights: RankWeights

    def vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self.weights.rows(parts)

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        matrix = self.weights.matrix_rows(parts)
        return matrix if parts[0].name == HEAD else self._quantized(matrix)

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return self._quantized(self.weights.matrix_columns(name, shape, columns))

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        return self.weights.tied_head(embedding_VD)

    def _quantized(self, matrix: Weight) -> Weight:
        return matrix if isinstance(matrix, QuantizedWeight | GroupedWeight) else quantize_weight(_plain(matrix))


@dataclass(frozen=True, slots=True)
class IntegerRankWeights:
    """In integers, the output head in those of 8 bits with a scale per output. An embedding that is the head as well
    stays as it is for look-ups.

    Matrices that come quantized, as those of engine directories do, pass as they are.
    """

    weights: RankWeights
    integers: IntegerWeights

    def vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self.weights.rows(parts)

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        matrix = self.weights.matrix_rows(parts)
        return self._head(matrix) if parts[0].name == HEAD else self._quantized(matrix)

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return self._quantized(self.weights.matrix_columns(name, shape, columns))

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        return self._head(self.weights.tied_head(embedding_VD))

    def _quantized(self, matrix: Weight) -> Weight:
        if isinstance(matrix, QuantizedWeight | GroupedWeight):
            return matrix
        made = self.integers
        return quantize_integers(
            _plain(matrix),
            bits=made.bits,
            group_size=made.group_size,
            row_bits=made.row_bits,
            has_minimums=made.has_minimums,
        )

    def _head(self, matrix: Weight) -> Weight:
        if isinstance(matrix, QuantizedWeight | GroupedWeight):
            return matrix
        row_bits = self.integers.row_bits
        return quantize_integers(_plain(matrix), bits=_BITS_OF_HEAD, group_size=None, row_bits=row_bits)


def _plain(matrix: Weight) -> Tensor:
    assert isinstance(matrix, Tensor), "a packed matrix is in an engine directory that was saved without quantization"
    return matrix
