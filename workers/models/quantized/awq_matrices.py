"""`AwqMatrices`: 4-bit matrices as AutoAWQ's GEMM version packs them: transposed, outputs in an order of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.weights import Weight
from tensorweave.workers.models.quantized.integer_groups import IntegerGroups
from tensorweave.workers.models.quantized.matrix_format import FLOATS, MatrixPart, Stored, StoredTensors
from tensorweave.workers.models.quantized.words import codes_of_words

# N outputs, K inputs, G groups of inputs

_PER_WORD: Final = 8
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of its eight outputs is, counted from the lowest bits."""


@dataclass(frozen=True, slots=True)
class AwqMatrices:
    """weight = scales * (code - zero), with a scale and a zero for each group of inputs."""

    group_size: int
    bits: int = 4

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        if f"{module}.qweight" not in source.shapes:
            return None
        N, K = shape
        G, words = K // self._size(K), N // _PER_WORD
        return {
            f"{module}.qweight": Stored.of((K, words), "I32"),
            f"{module}.qzeros": Stored.of((G, words), "I32"),
            f"{module}.scales": Stored.of((G, N), *FLOATS),
        }

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        first, last = part.rows.start // _PER_WORD, -(-part.rows.stop // _PER_WORD)
        words = slice(first, last)
        outputs = slice(part.rows.start - first * _PER_WORD, part.rows.stop - first * _PER_WORD)
        K = part.shape[1]
        G = K // self._size(K)
        codes_NK = _outputs(source.read(f"{part.module}.qweight", slice(0, K), words))[outputs]
        zeros_NG = _outputs(source.read(f"{part.module}.qzeros", slice(0, G), words))[outputs]
        scales_NG = source.read(f"{part.module}.scales", slice(0, G), part.row_slice).T.contiguous()
        return IntegerGroups(codes_NK, scales_NG, zeros_NG.float(), self._size(K), self.bits).weight(part)

    def _size(self, num_inputs: int) -> int:
        return num_inputs if self.group_size == -1 else self.group_size


def _outputs(words_KW: Tensor) -> Tensor:
    """[8 W, K] of the words [K, W], which hold eight outputs each."""
    K, W = words_KW.shape
    codes = codes_of_words(words_KW, 4).view(K, W, _PER_WORD)[:, :, torch.tensor(_PLACES)]
    return codes.reshape(K, W * _PER_WORD).T.contiguous()
