"""Tiles of queries: how the attention of prompt chunks is cut into pieces of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

TILE_QUERIES: Final = 128


def tile_chunks(chunks: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.int32]:
    """[Z, 4] first row, its position, number of rows, sequence of each tile; those with many keys first.

    Args:
        chunks: (position of its first token, length, sequence) of each; their rows follow each other. The sequence is
            the row of the block table.
    """
    tiles = []
    first_row = 0
    for position, length, sequence in chunks:
        for offset in range(0, length, TILE_QUERIES):
            rows = min(TILE_QUERIES, length - offset)
            tiles.append((first_row + offset, position + offset, rows, sequence))
        first_row += length
    tiles.sort(key=lambda tile: -(tile[1] + tile[2]))
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)
