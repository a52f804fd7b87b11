"""Tiles of queries: how the attention of prompt chunks is cut into pieces of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TILE_QUERIES: Final = 128


def tile_chunks(chunks: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.int32]:
    """[Z, 4] first row, its position, number of rows, sequence of each tile; those with many keys first.

    Args:
        chunks: (position of its first token, length, sequence) of each; their rows follow each other. The sequence is
            the row of the block table.
    """
    placed = []
    first_row = 0
    for position, length, sequence in chunks:
        placed.append((first_row, position, length, sequence))
        first_row += length
    return np.array(_cut(placed), dtype=np.int32).reshape(-1, 4)


def tile_queries(chunks: Sequence[tuple[int, int, int]], num_tiles: int | None = None) -> Tensor:
    """The same as an int32 tensor on the CPU.

    Args:
        chunks: (first row of the batch, its position, length) of each sequence, in the order of the block table.
        num_tiles: pad with empty tiles to this many, for a graph. Raises ValueError if there are more.
    """
    tiles = _cut([(*chunk, sequence) for sequence, chunk in enumerate(chunks)])
    if num_tiles is not None:
        if len(tiles) > num_tiles:
            raise ValueError(f"{len(tiles)} tiles of queries do not fit in {num_tiles}")
        tiles += [(0, 0, 0, 0)] * (num_tiles - len(tiles))
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4)


def count_tiles(num_queries: int) -> int:
    """The number of tiles of one chunk."""
    return -(-num_queries // TILE_QUERIES)


def _cut(chunks: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Chunks are (first row, its position, length, sequence)."""
    tiles = [
        (row + offset, position + offset, min(TILE_QUERIES, length - offset), sequence)
        for row, position, length, sequence in chunks
        for offset in range(0, length, TILE_QUERIES)
    ]
    tiles.sort(key=lambda tile: -(tile[1] + tile[2]))
    return tiles
