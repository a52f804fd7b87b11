"""`Fp8Matrices`: matrices in 8-bit floats (e4m3) with scales per tensor, per output, or per block.

One scale per output at most becomes a `QuantizedWeight`; blocks become a `GroupedFloatWeight`, whose groups are the
blocks' columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tensorweave.kernels.weights import GroupedFloatWeight, QuantizedWeight, Weight
from tensorweave.workers.models.quantized.matrix_format import (
    SCALES,
    MatrixPart,
    Stored,
    StoredTensors,
    read_scales,
)

E4M3: Final = "F8_E4M3"
_SCALE_NAMES: Final = ("weight_scale_inv", "weight_scale")
"""DeepSeek's name, although it multiplies, and that of all others."""


@dataclass(frozen=True, slots=True)
class Fp8Matrices:
    """`block` is [outputs, inputs] of one scale; None: a scale per tensor or per output."""

    block: tuple[int, int] | None

    bits: int = 8

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        name = f"{module}.weight"
        if source.dtypes.get(name) != E4M3:
            return None
        return {name: Stored.of(shape, E4M3), _scale_name(module, source): self._scales(shape)}

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        values_NK = source.read(f"{part.module}.weight", part.row_slice, part.column_slice)
        name = _scale_name(part.module, source)
        if self.block is None:
            scales = read_scales(source, name).flatten()
            scales_N = scales[part.row_slice] if len(scales) == part.shape[0] else scales.expand(len(part.rows))
            return QuantizedWeight(values_NK.contiguous(), scales_N.contiguous(), part.dtype)
        scales_RC = read_scales(source, name)
        height, width = self.block
        whole = GroupedFloatWeight.of_fp8(
            source.read(f"{part.module}.weight", part.row_slice, slice(0, part.shape[1])),
            scales_RC.repeat_interleave(height, dim=0)[part.row_slice],
            group_size=width,
            dtype=part.dtype,
        )
        return whole if part.is_whole_rows else whole.inputs(part.columns)

    def _scales(self, shape: tuple[int, int]) -> Stored:
        N, K = shape
        if self.block is None:
            return Stored(((), (1,), (N,), (N, 1), (1, 1)), SCALES)
        height, width = self.block
        return Stored.of((-(-N // height), -(-K // width)), *SCALES)


def _scale_name(module: str, source: StoredTensors) -> str:
    names = [f"{module}.{name}" for name in _SCALE_NAMES]
    return next((name for name in names if name in source.shapes), names[-1])
