"""Integer matrices as compressed-tensors keeps them: `IntMatrices`, one signed byte a code, and `PackedMatrices`, codes
of 2, 4 or 8 bits in 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.weights import Weight
from tensorweave.workers.models.quantized.integer_groups import IntegerGroups
from tensorweave.workers.models.quantized.matrix_format import FLOATS, MatrixPart, Stored, StoredTensors
from tensorweave.workers.models.quantized.words import WORD_BITS, codes_of_words

# N outputs, K inputs, G groups of inputs

_INTEGERS: Final = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class IntMatrices:
    """weight = scales * (code - zero), symmetric ones without zeros. `group_size` None: a scale per output or per
    tensor."""

    group_size: int | None
    is_symmetric: bool
    bits: int = 8

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        name = f"{module}.weight"
        if source.dtypes.get(name) != "I8":
            return None
        scales = _scale_shapes(shape, self.group_size)
        tensors = {name: Stored.of(shape, "I8"), f"{module}.weight_scale": Stored(scales, FLOATS)}
        if not self.is_symmetric:
            tensors[f"{module}.weight_zero_point"] = Stored(scales, ("I8", *_INTEGERS))
        return tensors

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        K = part.shape[1]
        signed_NK = source.read(f"{part.module}.weight", part.row_slice, slice(0, K))
        zeros_NG = None
        if not self.is_symmetric:
            zeros_NG = read_per_output(source, f"{part.module}.weight_zero_point", part).float() + 128
        return IntegerGroups(
            codes_NK=(signed_NK.contiguous().view(torch.uint8) ^ 128),
            scales_NG=read_per_output(source, f"{part.module}.weight_scale", part),
            zeros_NG=zeros_NG,
            group_size=self.group_size or K,
            bits=8,
        ).weight(part)


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """The same with codes in words, from the lowest bits on; zeros are packed along the outputs. With act-order,
    `weight_g_idx` is the group of each input."""

    bits: int
    group_size: int | None
    is_symmetric: bool

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        if f"{module}.weight_packed" not in source.shapes:
            return None
        N, K = shape
        G = -(-K // self.group_size) if self.group_size else 1
        tensors = {
            f"{module}.weight_packed": Stored.of((N, self._words(K)), "I32"),
            f"{module}.weight_scale": Stored(_scale_shapes(shape, self.group_size), FLOATS),
            f"{module}.weight_shape": Stored.of((2,), *_INTEGERS),
        }
        if not self.is_symmetric:
            tensors[f"{module}.weight_zero_point"] = Stored.of((self._words(N), G), "I32")
        if f"{module}.weight_g_idx" in source.shapes:
            tensors[f"{module}.weight_g_idx"] = Stored.of((K,), *_INTEGERS)
        return tensors

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        module, (N, K) = part.module, part.shape
        if source.read(f"{module}.weight_shape").tolist() != [N, K]:
            raise ValueError(f"{module}.weight_shape is not [{N}, {K}], which the model needs")
        words = source.read(f"{module}.weight_packed", part.row_slice, slice(0, self._words(K)))
        has_order = f"{module}.weight_g_idx" in source.shapes
        return IntegerGroups(
            codes_NK=codes_of_words(words, self.bits)[:, :K],
            scales_NG=read_per_output(source, f"{module}.weight_scale", part),
            zeros_NG=None if self.is_symmetric else self._zeros(source, part),
            group_size=self.group_size or K,
            bits=self.bits,
            groups_K=source.read(f"{module}.weight_g_idx").long() if has_order else None,
        ).weight(part)

    def _zeros(self, source: StoredTensors, part: MatrixPart) -> Tensor:
        """[N, G] float32."""
        words_GW = source.read(f"{part.module}.weight_zero_point").T
        return codes_of_words(words_GW, self.bits)[:, part.row_slice].T.float()

    def _words(self, count: int) -> int:
        return -(-count * self.bits // WORD_BITS)


def read_per_output(source: StoredTensors, name: str, part: MatrixPart) -> Tensor:
    """[N, G] of the part's outputs, also of a tensor that has one number per output or in all."""
    shape = source.shapes[name]
    if len(shape) == 2 and shape[0] == part.shape[0]:
        return source.read(name, part.row_slice, slice(0, shape[1])).contiguous()
    numbers = source.read(name).flatten()
    return (numbers[part.row_slice] if len(numbers) > 1 else numbers.repeat(len(part.rows))).unsqueeze(1)


def _scale_shapes(shape: tuple[int, int], group_size: int | None) -> tuple[tuple[int, ...], ...]:
    N, K = shape
    return ((), (1,), (1, 1), (N,), (N, 1)) if group_size is None else ((N, -(-K // group_size)),)
