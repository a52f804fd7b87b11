"""`QuantizingWeights`: quantizes each matrix of a layer right after it was read, on the device where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.weights import QuantizedWeight, Weight, quantize_weight
from tensorweave.workers.models.rank_weights import RankWeights, TensorRows
from tensorweave.workers.models.tensor_names import HEAD


@dataclass(frozen=True, slots=True)
class QuantizingWeights:
    """Passes on what `weights` returns. The output head is not quantized: its error would be that of the logits.

    Checkpoints that come quantized are to return `QuantizedWeight`s themselves, as engine directories do; those pass as
    they are.
    """

    weights: RankWeights

    def vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self.weights.rows(parts)

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        matrix = self.weights.matrix_rows(parts)
        return matrix if parts[0].name == HEAD else _quantized(matrix)

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return _quantized(self.weights.matrix_columns(name, shape, columns))

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        return self.weights.tied_head(embedding_VD)


def _quantized(matrix: Weight) -> QuantizedWeight:
    if isinstance(matrix, QuantizedWeight):
        return matrix
    assert isinstance(matrix, Tensor), "a packed matrix is in an engine directory that was saved without quantization"
    return quantize_weight(matrix)
