"""`GptqMatrices`: matrices as AutoGPTQ and GPTQModel pack them: transposed, inputs of a word in succession.

`g_idx` names the group of each input. With act-order a group's inputs lie apart, and the matrix becomes a
`ReorderedWeight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from tensorweave.kernels.weights import Weight
from tensorweave.workers.models.quantized.integer_groups import IntegerGroups
from tensorweave.workers.models.quantized.matrix_format import FLOATS, MatrixPart, Stored, StoredTensors
from tensorweave.workers.models.quantized.words import WORD_BITS, codes_of_words

# N outputs, K inputs, G groups of inputs

_INTEGERS: Final = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class GptqMatrices:
    """weight = scales * (code - zero), with a scale and a zero for each group of inputs. In the first format
    `zero_offset` is 1: what is stored is the zero minus 1."""

    bits: int
    group_size: int
    zero_offset: int

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        if f"{module}.qweight" not in source.shapes:
            return None
        N, K = shape
        G, per_word = -(-K // self._size(K)), WORD_BITS // self.bits
        tensors = {
            f"{module}.qweight": Stored.of((K // per_word, N), "I32"),
            f"{module}.qzeros": Stored.of((G, N // per_word), "I32"),
            f"{module}.scales": Stored.of((G, N), *FLOATS),
        }
        if f"{module}.g_idx" in source.shapes:
            tensors[f"{module}.g_idx"] = Stored.of((K,), *_INTEGERS)
        return tensors

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        module, K, per_word = part.module, part.shape[1], WORD_BITS // self.bits
        G = -(-K // self._size(K))
        words_KN = source.read(f"{module}.qweight", slice(0, K // per_word), part.row_slice)
        zeros_NG = self._zeros(source, part, G)
        has_order = f"{module}.g_idx" in source.shapes
        return IntegerGroups(
            codes_NK=codes_of_words(words_KN.T, self.bits),
            scales_NG=source.read(f"{module}.scales", slice(0, G), part.row_slice).T.contiguous(),
            zeros_NG=zeros_NG,
            group_size=self._size(K),
            bits=self.bits,
            groups_K=source.read(f"{module}.g_idx").long() if has_order else None,
        ).weight(part)

    def _zeros(self, source: StoredTensors, part: MatrixPart, num_groups: int) -> Tensor:
        """[N, G] float32."""
        per_word = WORD_BITS // self.bits
        first = part.rows.start // per_word
        words = slice(first, -(-part.rows.stop // per_word))
        stored_GN = codes_of_words(source.read(f"{part.module}.qzeros", slice(0, num_groups), words), self.bits)
        stored_GN = stored_GN[:, part.rows.start - first * per_word :][:, : len(part.rows)]
        if self.zero_offset and bool((stored_GN == (1 << self.bits) - 1).any()):
            raise ValueError(
                f"{part.module}.qzeros has the largest value that {self.bits} bits hold, which readers of the first "
                f"GPTQ format take for zero points of 0 or of {1 << self.bits}; save the checkpoint as gptq_v2"
            )
        return stored_GN.T.float() + self.zero_offset

    def _size(self, num_inputs: int) -> int:
        return num_inputs if self.group_size == -1 else self.group_size
