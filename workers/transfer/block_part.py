"""`BlockPart`: some layers of some blocks, where they lie in the sender's pool, with a digest of each; on the wire a
body of little-endian 64-bit numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorweave.cluster.errors import WireError

Digests = npt.NDArray[np.int64]
_NUMBERS: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class BlockPart:
    """`rows_N5`: of each block its index in the prompt, its generation, how many of its tokens belong to the prompt,
    its number in the sender's pool, and the digest of the read's heads in these layers (`combine_digests`): a part is
    right or wrong as a whole, and 8 bytes of a block of 2 MB are sent where the digests of all heads are 2 KB."""

    layers: range
    rows_N5: Digests

    @property
    def digests_N(self) -> Digests:
        return self.rows_N5[:, 4]

    def body(self) -> memoryview:
        return self.rows_N5.astype("<i8", order="C", copy=False).data.cast("B")

    def chosen(self, rows: npt.NDArray[np.intp]) -> BlockPart:
        """These of its blocks."""
        return BlockPart(self.layers, self.rows_N5[rows])

    @classmethod
    def from_body(cls, layers: range, body: memoryview) -> BlockPart:
        """Raises WireError if the body does not consist of such blocks, each once."""
        if not len(body) or len(body) % (8 * _NUMBERS):
            raise WireError("a part of blocks has the wrong length")
        rows_N5 = np.frombuffer(body, "<i8").astype(np.int64).reshape(-1, _NUMBERS)
        indices = np.sort(rows_N5[:, 0])
        if (indices[1:] == indices[:-1]).any():
            raise WireError("a part of blocks has a block twice")
        return cls(layers, rows_N5)
