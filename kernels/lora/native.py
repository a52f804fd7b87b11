"""Low-rank updates by the native kernels: of one product, or within the one call of all layers
(`kernels.native.layers`). A row's result does not depend on its batch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from tensorweave.kernels.lora.reference import NO_UPDATES, UpdatePart, Updates
from tensorweave.kernels.native.library import NativeKernels
from tensorweave.kernels.native.structures import UpdateBlock, UpdateSegment, UpdateSite
from tensorweave.kernels.native.structures import UpdatePart as PartStructure
from tensorweave.kernels.weights import huge_pages

_TILE_RANKS: Final = 4

# T tokens, K inputs and N outputs of a product, R rank of a part, W outputs of a panel of B


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`sites` is an array of `UpdateSite`; `held` is what it points to."""

    sites: Any
    most_rank: int
    held: tuple[Any, ...]


RowsOf: TypeAlias = Sequence[tuple[PackedAdapter, Sequence[int]]]


class NativeAdapters:
    """Scratch grows to the largest step seen, and is kept. One step at a time."""

    def __init__(self, native: NativeKernels) -> None:
        self._native = native
        self._scratch = torch.empty(0, dtype=native.dtype)

    def pack(self, sites: Sequence[Sequence[UpdatePart]]) -> PackedAdapter:
        """Copies all matrices into memory of its own. There may be none: an adapter may change no product here."""
        width, length, dtype = self._native.update_width, 2 * self._native.vector_length, self._native.dtype
        parts = [part for site in sites for part in site]
        ranks = [_up_to(len(part.a_RK), 2) for part in parts]
        sizes = [
            (_up_to(part.a_RK.shape[1], length) * rank, _up_to(len(part.b_NR), width) * rank)
            for part, rank in zip(parts, ranks, strict=True)
        ]
        memory = huge_pages((max(1, sum(map(sum, sizes))),), dtype)
        structures, at = (PartStructure * max(1, len(parts)))(), 0
        for structure, part, rank, (size_of_a, size_of_b) in zip(structures, parts, ranks, sizes, strict=False):
            a, b = memory[at : at + size_of_a], memory[at + size_of_a : at + size_of_a + size_of_b]
            _pack_tiles(part.a_RK, a, rank, length)
            _pack_panels(part.b_NR, b, rank, width)
            structure.a, structure.b = a.data_ptr(), b.data_ptr()
            structure.rank, structure.first, structure.num_outputs = rank, part.first, len(part.b_NR)
            at += size_of_a + size_of_b
        packed, first = (UpdateSite * len(sites))(), 0
        for site, of in zip(packed, sites, strict=True):
            site.parts = ctypes.addressof(structures) + first * ctypes.sizeof(PartStructure)
            site.num_parts, site.rank = len(of), sum(ranks[first : first + len(of)])
            first += len(of)
        return PackedAdapter(packed, max((site.rank for site in packed), default=0), (memory, structures))

    def plan(self, rows: RowsOf, num_tokens: int) -> Updates:
        if not rows:
            return NO_UPDATES
        most_rank = max(adapter.most_rank for adapter, _ in rows)
        size = most_rank * sum(len(of) for _, of in rows)
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=self._native.dtype)
        return NativeUpdates(self._native, rows, num_tokens, most_rank, self._scratch)


class NativeUpdates:
    def __init__(self, native: NativeKernels, rows: RowsOf, num_tokens: int, most_rank: int, scratch: Tensor) -> None:
        self._native = native
        self._rows = rows
        self._num_tokens = num_tokens
        self._most_rank = most_rank
        self._scratch = scratch
        self._blocks: dict[int, tuple[Any, list[Any]]] = {}

    def add(self, site: int, x_TK: Tensor, out_TN: Tensor) -> Tensor:
        arguments = x_TK.data_ptr(), x_TK.shape[1], out_TN.data_ptr(), out_TN.shape[1]
        self._native.add_updates(self.blocks(self._num_tokens), site, *arguments)
        return out_TN

    def blocks(self, size: int) -> int:
        """The address of the `UpdateBlock`s of each `size` rows, as long as this object lives."""
        size = min(size, self._num_tokens)
        if size not in self._blocks:
            self._blocks[size] = self._make_blocks(size)
        return ctypes.addressof(self._blocks[size][0])

    def _make_blocks(self, size: int) -> tuple[Any, list[Any]]:
        count = -(-self._num_tokens // size)
        blocks, held = (UpdateBlock * count)(), list[Any]()
        for number, block in enumerate(blocks):
            start = number * size
            found = [(adapter, _within(rows, start, start + size)) for adapter, rows in self._rows]
            found = [(adapter, rows) for adapter, rows in found if rows]
            segments, first = (UpdateSegment * max(1, len(found)))(), 0
            for segment, (adapter, rows) in zip(segments, found, strict=False):
                indices = (ctypes.c_int64 * len(rows))(*rows)
                segment.sites, segment.rows = ctypes.addressof(adapter.sites), ctypes.addressof(indices)
                segment.num_rows, segment.first = len(rows), first
                first += len(rows)
                held.append(indices)
            held.append(segments)
            block.segments, block.num_segments = ctypes.addressof(segments), len(found)
            block.most_rank, block.scratch = self._most_rank, self._scratch.data_ptr()
        return blocks, held


def _within(rows: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """The numbers in [start, stop), counted from `start`."""
    return [row - start for row in rows if start <= row < stop]


def _up_to(size: int, step: int) -> int:
    """The next multiple."""
    return -(-size // step) * step


def _pack_tiles(a_RK: Tensor, tiles: Tensor, rank: int, length: int) -> None:
    """To tiles of 4 rows (or 2, the last), each [K / length, rows, length]."""
    R, K = a_RK.shape
    lengthened = a_RK.new_zeros(rank, _up_to(K, length))
    lengthened[:R, :K] = a_RK
    for first in range(0, rank, _TILE_RANKS):
        rows, tile = lengthened[first : first + _TILE_RANKS], tiles.view(rank, -1)[first : first + _TILE_RANKS]
        tile.view(-1, len(rows), length).copy_(rows.view(len(rows), -1, length).transpose(0, 1))


def _pack_panels(b_NR: Tensor, panels: Tensor, rank: int, width: int) -> None:
    """To [panels, rank, W]; of bfloat16 two ranks alternate, [panels, rank / 2, W, 2]."""
    N, R = b_NR.shape
    alternating = 2 if b_NR.dtype == torch.bfloat16 else 1
    panels_PRWS = panels.view(-1, rank // alternating, width, alternating)
    lengthened = b_NR.new_zeros(len(panels_PRWS) * width, rank)
    lengthened[:N, :R] = b_NR
    panels_PRWS.copy_(lengthened.view(-1, width, rank // alternating, alternating).transpose(1, 2))
