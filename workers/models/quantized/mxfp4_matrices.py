"""`Mxfp4Matrices`: 4-bit floats (e2m1) with an exponent of 2 for each 32 inputs, as compressed-tensors keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tensorweave.kernels.weights import GroupedFloatWeight, Weight
from tensorweave.workers.models.quantized.matrix_format import MatrixPart, Stored, StoredTensors, read_scales

MXFP4_GROUP: Final = 32


@dataclass(frozen=True, slots=True)
class Mxfp4Matrices:
    bits: int = 4

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        if f"{module}.weight_packed" not in source.shapes:
            return None
        N, K = shape
        return {
            f"{module}.weight_packed": Stored.of((N, K // 2), "U8"),
            f"{module}.weight_scale": Stored.of((N, K // MXFP4_GROUP), "U8", "F8_E8M0"),
        }

    def read(self, source: StoredTensors, part: MatrixPart) -> Weight:
        K = part.shape[1]
        whole = GroupedFloatWeight(
            codes=source.read(f"{part.module}.weight_packed", part.row_slice, slice(0, K // 2)).contiguous(),
            scales_NG=read_scales(
                source, f"{part.module}.weight_scale", part.row_slice, slice(0, K // MXFP4_GROUP)
            ).contiguous(),
            num_inputs=K,
            group_size=MXFP4_GROUP,
            kind="e2m1",
            dtype=part.dtype,
        )
        return whole if part.is_whole_rows else whole.inputs(part.columns)
