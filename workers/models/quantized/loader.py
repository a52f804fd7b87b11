"""`QuantizedLoader`: reads one rank's share of a checkpoint that comes quantized, each matrix in its own form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.weights import Weight, stack_weights, to_device
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization, module_of
from tensorweave.workers.models.quantized.matrix_format import MatrixPart, StoredTensors
from tensorweave.workers.models.rank_weights import TensorRows


@dataclass(frozen=True, slots=True)
class QuantizedLoader:
    """A `RankWeights`. `plain` reads what is not quantized, from the same `source`."""

    source: StoredTensors
    quantization: CheckpointQuantization
    plain: WeightLoader

    def vector(self, name: str, size: int) -> Tensor:
        return self.plain.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        """What is to be plain, such as the router of a mixture of experts, is dequantized if it comes quantized."""
        weight = self.matrix_rows(parts) if self._has_quantized(parts) else self.plain.rows(parts)
        return weight if isinstance(weight, Tensor) else weight.rows()

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        if not self._has_quantized(parts):
            return self.plain.matrix_rows(parts)
        return stack_weights([self._matrix(part, range(part.shape[1])) for part in parts])

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return self._matrix(TensorRows(name, shape, range(shape[0])), columns)

    def tied_head(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD

    def _has_quantized(self, parts: Sequence[TensorRows]) -> bool:
        return any(self.quantization.format_of(part.name, part.shape, self.source) is not None for part in parts)

    def _matrix(self, rows: TensorRows, columns: range) -> Weight:
        shape = (rows.shape[0], rows.shape[1])
        form, module = self.quantization.format_of(rows.name, shape, self.source), module_of(rows.name, shape)
        if form is not None and module is not None:
            part = MatrixPart(module, shape, rows.rows, columns, self.plain.dtype)
            return to_device(form.read(self.source, part), self.plain.device)
        if columns == range(shape[1]):
            return self.plain.matrix_rows([rows])
        return self.plain.matrix_columns(rows.name, shape, columns)
