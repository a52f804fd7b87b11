"""`StackedMxfp4Matrices`: the experts of gpt-oss, whose MXFP4 tensors have all experts of a layer.

gate_up_proj_blocks [E, 2 I, D / 32, 16] and down_proj_blocks [E, D, I / 32, 16] have two 4-bit floats (e2m1) a byte,
the input of even number in the lower bits; …_scales have an exponent of 2 for each block. Gates and ups alternate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tensorweave.kernels.weights import GroupedFloatWeight, GroupedWeight
from tensorweave.workers.models.quantized.matrix_format import MatrixPart, Stored, StoredTensors, read_scales
from tensorweave.workers.models.quantized.mxfp4_matrices import MXFP4_GROUP

# E experts, D hidden size, I intermediate width of an expert, N outputs, K inputs

_EXPERT: Final = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj")
_PHASES: Final = {"gate": 0, "up": 1}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Of the expert `number`, every `step`-th output of the tensors that begin with `stored`, from `phase` on."""

    stored: str
    number: int
    phase: int
    step: int

    @classmethod
    def of(cls, module: str) -> _Rows | None:
        """None if it is no expert's."""
        found = _EXPERT.fullmatch(module)
        if found is None:
            return None
        if found["part"] == "down":
            return cls(f"{found['experts']}.down_proj", int(found["number"]), 0, 1)
        return cls(f"{found['experts']}.gate_up_proj", int(found["number"]), _PHASES[found["part"]], 2)


@dataclass(frozen=True, slots=True)
class StackedMxfp4Matrices:
    """They are kept as integers of 8 bits with the same scales, which is exact, and for which there are products."""

    bits: int = 8

    def find(self, module: str, shape: tuple[int, int], source: StoredTensors) -> Mapping[str, Stored] | None:
        rows = _Rows.of(module)
        if rows is None or f"{rows.stored}_blocks" not in source.shapes:
            return None
        num_experts, (N, K) = source.shapes[f"{rows.stored}_blocks"][0], shape
        groups = (num_experts, N * rows.step, K // MXFP4_GROUP)
        return {
            f"{rows.stored}_blocks": Stored.of((*groups, MXFP4_GROUP // 2), "U8"),
            f"{rows.stored}_scales": Stored.of(groups, "U8", "F8_E8M0"),
        }

    def read(self, source: StoredTensors, part: MatrixPart) -> GroupedWeight:
        rows, K = _Rows.of(part.module), part.shape[1]
        assert rows is not None
        outputs = slice(part.rows.start * rows.step, part.rows.stop * rows.step)
        index = (slice(rows.number, rows.number + 1), outputs, slice(0, K // MXFP4_GROUP))
        blocks = source.read(f"{rows.stored}_blocks", *index, slice(0, MXFP4_GROUP // 2))[0, rows.phase :: rows.step]
        scales = read_scales(source, f"{rows.stored}_scales", *index)[0, rows.phase :: rows.step]
        codes = blocks.flatten(1).contiguous()
        whole = GroupedFloatWeight(codes, scales.contiguous(), K, MXFP4_GROUP, "e2m1", part.dtype).in_integers()
        return whole if part.is_whole_rows else whole.inputs(part.columns)
