"""`GgufLoader`: reads one rank's share of a GGUF file, each matrix in its own quantized form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorweave.kernels.weights import Weight, stack_weights
from tensorweave.workers.models.gguf.file import GgufFile
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.rank_weights import TensorRows
from tensorweave.workers.models.tensor_names import EMBEDDING


class GgufLoader:
    """A `RankWeights` on the CPU. Embeddings are dequantized; a head that is tied to one multiplies with its blocks."""

    def __init__(self, source: GgufFile, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self._plain = WeightLoader(source, dtype, torch.device("cpu"))
        self._embedding: TensorRows | None = None

    def vector(self, name: str, size: int) -> Tensor:
        return self._plain.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        if parts[0].name == EMBEDDING:
            self._embedding = parts[0]
        return self._plain.rows(parts)

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Weight:
        if all(self._source.is_plain(part.name) for part in parts):
            return self._plain.matrix_rows(parts)
        return stack_weights([self._matrix(part) for part in parts])

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        if self._source.is_plain(name):
            return self._plain.matrix_columns(name, shape, columns)
        whole = self._source.grouped(name, range(shape[0]), self._dtype)
        return whole if columns == range(shape[1]) else whole.inputs(columns)

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        assert self._embedding is not None, "the embedding is asked for first"
        return embedding_VD if self._source.is_plain(EMBEDDING) else self._matrix(self._embedding)

    def _matrix(self, part: TensorRows) -> Weight:
        if self._source.is_plain(part.name):
            return self._plain.matrix_rows([part])
        return self._source.grouped(part.name, part.rows, self._dtype)
