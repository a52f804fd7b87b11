"""`StepInputs`: from a scheduled batch to the numbers of a step in buffers of fixed address on the device.

Every step has the rows that sample: their slots, their lengths and, for decodes, their tokens. A step with prompt
chunks has more, which `MixedInputs` describes; small ones have a buffer of their own, so that they can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.kernels.attention.tiles import count_tiles, tile_chunks
from tensorweave.kernels.step.reference import FROM_DEVICE, SequenceState, TableUpdate
from tensorweave.workers.engine.device.adapter_places import PlacesAdapters
from tensorweave.workers.engine.device.sequence_tables import Ints, SequenceTables
from tensorweave.workers.engine.device.staging import StepStaging
from tensorweave.workers.engine.device.step_layout import StepLayout
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.resources import KVCache

# R rows that sample, G decodes, T prompt tokens, Z tiles of queries, all padded; E entries of an update; S slots
# W blocks of a table

_NUM_ENTRIES: Final = 1024
"""Changes of block tables that a step takes with its other numbers; more are sent before it."""


@dataclass(frozen=True, slots=True)
class MixedSize:
    """How much of each array a step with prompt chunks uses."""

    num_decodes: int
    num_prompt_tokens: int
    num_rows: int
    num_tiles: int

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prompt_tokens

    def holds(self, other: MixedSize) -> bool:
        return (
            self.num_decodes >= other.num_decodes
            and self.num_prompt_tokens >= other.num_prompt_tokens
            and self.num_rows >= other.num_rows
            and self.num_tiles >= other.num_tiles
        )


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Slots of some rows, lengths in tokens with the new one, tokens or FROM_DEVICE, and the places of their adapters.
    int32 on the device."""

    slots_R: Tensor
    lengths_R: Tensor
    given_tokens_R: Tensor
    places_R: Tensor


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """Inputs of a step with prompt chunks, whose tokens are its decodes first, then the chunks. int32 on the device.

    Args:
        decodes: one row a decode.
        sampled_rows_R: which of the step's tokens sample, in the order of `ScheduledBatch.sampled`.
        token_ids_T, positions_T: of the chunks' tokens.
        kv_slots_T: block * P + offset; -1: padding.
        tiles_Z4: see `kernels.attention.tiles`; rows count from the first chunk's.
        chunk_places_T: places of the chunks' adapters, -1: none.
    """

    decodes: RowInputs
    sampled_rows_R: Tensor
    token_ids_T: Tensor
    positions_T: Tensor
    kv_slots_T: Tensor
    tiles_Z4: Tensor
    chunk_places_T: Tensor


class MixedBuffer:
    """Where `MixedInputs` of up to some size lie."""

    def __init__(self, most: MixedSize, device: torch.device) -> None:
        self.most = most
        lengths = _lengths(most)
        aligned = [-(-length // 4) * 4 for length in lengths]  # arrays begin at 16 bytes
        self._starts = [sum(aligned[:i]) for i in range(len(lengths))]
        self._staging = StepStaging(sum(aligned), device)

    def views(self, size: MixedSize) -> MixedInputs:
        decodes = [self._view(i, size.num_decodes) for i in range(4)]
        ids_T, positions_T, kv_slots_T, places_T = (self._view(i, size.num_prompt_tokens) for i in (5, 6, 7, 9))
        return MixedInputs(
            decodes=RowInputs(*decodes),
            sampled_rows_R=self._view(4, size.num_rows),
            token_ids_T=ids_T,
            positions_T=positions_T,
            kv_slots_T=kv_slots_T,
            tiles_Z4=self._view(8, 4 * size.num_tiles).view(-1, 4),
            chunk_places_T=places_T,
        )

    def send(self, arrays: Sequence[Sequence[int] | Ints], padding: Sequence[int], size: MixedSize) -> None:
        """`arrays` in the order of the fields, `padding` what fills each up to `size`."""
        host = self._staging.next()
        counts = _lengths(size)
        for start, numbers, count, fill in zip(self._starts, arrays, counts, padding, strict=True):
            host[start : start + len(numbers)] = numbers
            host[start + len(numbers) : start + count] = fill
        self._staging.send(self._starts[-1] + counts[-1])

    def _view(self, index: int, count: int) -> Tensor:
        start = self._starts[index]
        return self._staging.device_E[start : start + count]


def _lengths(size: MixedSize) -> list[int]:
    """The lengths of the arrays of a `MixedBuffer`, in the order of the fields."""
    tokens = size.num_prompt_tokens
    return [size.num_decodes] * 4 + [size.num_rows] + [tokens] * 3 + [4 * size.num_tiles, tokens]


class StepInputs:
    """Used by one thread."""

    def __init__(
        self,
        max_rows: int,
        max_tokens: int,
        tables: SequenceTables,
        adapters: PlacesAdapters,
        tokens_per_block: int,
        device: torch.device,
    ) -> None:
        self._tables = tables
        self._adapters = adapters
        self._tokens_per_block = tokens_per_block
        self._max_rows = max_rows
        self._rows = StepStaging(4 * max_rows + 2 * _NUM_ENTRIES, device)
        most_tiles = count_tiles(max_tokens) + min(max_rows, max_tokens)
        self.mixed = MixedBuffer(MixedSize(max_rows, max_tokens, max_rows, most_tiles), device)
        num_slots, width = tables.tables_SW.shape
        self.state = SequenceState(
            tables_SW=torch.zeros(num_slots, width, dtype=torch.int32, device=device),
            tokens_S=torch.zeros(num_slots, dtype=torch.int32, device=device),
        )
        self._padding_place = tables.padding_slot * width
        self.max_length = width * tokens_per_block

    def rows(self, num_rows: int) -> RowInputs:
        """The inputs of the first rows that sample."""
        R, device_E = self._max_rows, self._rows.device_E
        return RowInputs(*(device_E[i * R : i * R + num_rows] for i in range(4)))

    @property
    def update(self) -> TableUpdate:
        first, E = 4 * self._max_rows, _NUM_ENTRIES
        places_E, blocks_E = torch.split(self._rows.device_E[first : first + 2 * E], E)
        return TableUpdate(places_E, blocks_E)

    def send_decodes(self, batch: ScheduledBatch, kv_cache: KVCache, num_padded: int) -> None:
        """Bring a step of decodes alone to the device."""
        self._adapters.prepare(batch)
        self._send_rows(self._describe(batch.sampled, kv_cache), num_padded)

    def send_mixed(
        self, batch: ScheduledBatch, kv_cache: KVCache, buffer: MixedBuffer, size: MixedSize, num_padded: int
    ) -> None:
        """Bring a step with chunks to the device. Rows that sample are padded to `num_padded`."""
        self._adapters.prepare(batch)
        layout = StepLayout.of(batch)
        slots = [self._tables.slot_of(row.request, kv_cache.block_ids(row.request)) for row in layout.chunks]
        sampled = self._describe(layout.samples, kv_cache)
        decodes = [numbers[layout.decodes] for numbers in sampled]
        self._send_chunks(layout, slots, decodes, buffer, size)
        self._send_rows(sampled, num_padded)

    def _send_rows(self, described: Sequence[Sequence[int]], num_padded: int) -> None:
        """Slots, lengths, tokens and adapters of the rows that sample, and what block tables lack."""
        R, host = self._max_rows, self._rows.next()
        for i, (numbers, fill) in enumerate(zip(described, self._row_padding, strict=True)):
            host[i * R : i * R + len(numbers)] = numbers
            host[i * R + len(numbers) : i * R + num_padded] = fill
        places, blocks = self._take_changes()
        first, E = 4 * R, _NUM_ENTRIES
        host[first : first + len(places)] = places
        host[first + len(places) : first + E] = self._padding_place
        host[first + E : first + E + len(blocks)] = blocks
        host[first + E + len(blocks) : first + 2 * E] = 0
        self._rows.send(4 * R + 2 * E)

    @property
    def _row_padding(self) -> tuple[int, int, int, int]:
        return self._tables.padding_slot, 0, 0, -1

    def _describe(self, rows: Sequence[StepRow], kv_cache: KVCache) -> tuple[Sequence[int], ...]:
        """Slots, lengths, tokens and places of adapters: of each row, or of none where there are no adapters."""
        slots, lengths, tokens = [], [], []
        slot_of, block_ids = self._tables.slot_of, kv_cache.block_ids
        for request, start, length, _ in rows:
            slots.append(slot_of(request, block_ids(request)))
            lengths.append(start + length)
            known = request.tokens
            tokens.append(known[start] if start < len(known) else FROM_DEVICE)
        return slots, lengths, tokens, self._adapters.places_of(rows)

    def _take_changes(self) -> tuple[Ints, Ints]:
        """Take at most as many changes as a step carries; those before are written into the tables now."""
        places, blocks = self._tables.take_changes()
        if len(places) <= _NUM_ENTRIES:
            return places, blocks
        device = self.state.tables_SW.device
        ahead = torch.from_numpy(np.stack([places, blocks])[:, :-_NUM_ENTRIES].copy())
        if device.type == "cuda":
            ahead = ahead.pin_memory().to(device, non_blocking=True)
        self.state.tables_SW.view(-1).index_copy_(0, ahead[0].long(), ahead[1])
        return places[-_NUM_ENTRIES:], blocks[-_NUM_ENTRIES:]

    def _send_chunks(
        self,
        layout: StepLayout,
        slots: Sequence[int],
        decodes: Sequence[Sequence[int]],
        buffer: MixedBuffer,
        size: MixedSize,
    ) -> None:
        """`slots` are those of the chunks; `decodes` are what `_describe` has of the others."""
        chunks = layout.chunks
        positions = [np.arange(row.start, row.stop, dtype=np.int32) for row in chunks]
        P, tables_SW = self._tokens_per_block, self._tables.tables_SW
        kv_slots = [tables_SW[slot, at // P] * P + at % P for slot, at in zip(slots, positions, strict=True)]
        tiles = tile_chunks([(row.start, row.length, slot) for row, slot in zip(chunks, slots, strict=True)])
        arrays: list[Sequence[int] | Ints] = [
            *decodes,
            layout.places(size.num_decodes),
            layout.token_ids(),
            np.concatenate(positions),
            np.concatenate(kv_slots),
            tiles.reshape(-1),
            self._adapters.token_places_of(chunks),
        ]
        buffer.send(arrays, (*self._row_padding, 0, 0, 0, -1, 0, -1), size)


def size_of(batch: ScheduledBatch) -> MixedSize:
    """The size of a step with chunks, not padded."""
    chunks = StepLayout.of(batch).chunks
    num_tokens = sum(row.length for row in chunks)
    most_tiles = sum(count_tiles(row.length) for row in chunks)
    num_decodes = len(batch.context) + len(batch.generation) - len(chunks)
    return MixedSize(num_decodes, num_tokens, batch.num_samples, most_tiles)
