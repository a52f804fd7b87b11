"""Weights that are quantized matrix by matrix right after they were read, on the device where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import Tensor

from tensorweave.cluster.quant_config import IntegerWeights
from tensorweave.kernels.quantize_integers import quantize_integers
from tensorweave.kernels.weights import GroupedWeight, QuantizedWeight, Weight, quantize_weight
from tensorweave.workers.models.rank_weights import RankWeights, TensorRows
from tensorweave.workers.models.tensor_names import HEAD

Quantize = Callable[[Tensor], Weight]

_BITS_OF_HEAD: Final = 8


def quantizing(weights: RankWeights, quantization: str | None) -> RankWeights:
    """`quantization` is a name as `weight_quantization` returns it. Beside 8-bit floats the output head stays as it is:
    its error would be that of the logits. Beside integers it is in those of 8 bits with a scale per output."""
    if quantization is None:
        return weights
    integers = IntegerWeights.parse(quantization)
    if integers is None:
        assert quantization == "fp8", quantization
        return QuantizingWeights(weights, quantize_weight, quantize_head=None)
    quantize = partial(
        quantize_integers,
        bits=integers.bits,
        group_size=integers.group_size,
        row_bits=integers.row_bits,
        has_minimums=integers.has_minimums,
    )
    quantize_head = partial(quantize_integers, bits=_BITS_OF_HEAD, group_size=None, row_bits=integers.row_bits)
    return QuantizingWeights(weights, quantize, quantize_head)


@dataclass(frozen=True, slots=True)
class QuantizingWeights:
    """Quantizes matrices, and the output head in a way of its own; None: not at all. An embedding that is the head as
    well stays as it is for look-ups.

    Matrices that come quantized, as those of engine directories do, pass as they are.
    """

    weights: RankWeights
    quantize: Quantize
    quantize_head: Quantize | None

    def vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self.weights.rows(parts)

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        quantize = self.quantize_head if parts[0].name == HEAD else self.quantize
        return _quantized(self.weights.matrix_rows(parts), quantize)

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return _quantized(self.weights.matrix_columns(name, shape, columns), self.quantize)

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        return _quantized(self.weights.tied_head(embedding_VD), self.quantize_head)


def _quantized(matrix: Weight, quantize: Quantize | None) -> Weight:
    if quantize is None or isinstance(matrix, QuantizedWeight | GroupedWeight):
        return matrix
    assert isinstance(matrix, Tensor), "a packed matrix is in an engine directory that was saved without quantization"
    return quantize(matrix)
