"""`BlockPart`: some layers of some blocks, where they lie in the sender's pool, with their digests; on the wire a body
of little-endian 64-bit numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorweave.cluster.errors import WireError

Digests = npt.NDArray[np.int64]
_ROW: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class BlockPart:
    """`rows_N4`: of each block its index in the prompt, its generation, how many of its tokens belong to the prompt,
    and its number in the sender's pool. `digests_NLK`: of the read's heads in these layers."""

    layers: range
    rows_N4: Digests
    digests_NLK: Digests

    def body(self) -> list[memoryview]:
        return [array.astype("<i8", order="C", copy=False).data.cast("B") for array in (self.rows_N4, self.digests_NLK)]

    def chosen(self, rows: npt.NDArray[np.intp]) -> BlockPart:
        """These of its blocks."""
        return BlockPart(self.layers, self.rows_N4[rows], self.digests_NLK[rows])

    @classmethod
    def from_body(cls, layers: range, num_heads: int, body: memoryview) -> BlockPart:
        """Raises WireError if the body does not consist of such blocks, each once."""
        row_bytes = 8 * (_ROW + len(layers) * num_heads)
        if not len(body) or len(body) % row_bytes:
            raise WireError("a part of blocks has the wrong length")
        num_blocks = len(body) // row_bytes
        numbers = np.frombuffer(body, "<i8").astype(np.int64)
        rows_N4 = numbers[: num_blocks * _ROW].reshape(num_blocks, _ROW)
        if len(np.unique(rows_N4[:, 0])) < num_blocks:
            raise WireError("a part of blocks has a block twice")
        digests_NLK = numbers[num_blocks * _ROW :].reshape(num_blocks, len(layers), num_heads)
        return cls(layers, rows_N4, digests_NLK)
