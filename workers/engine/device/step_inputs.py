"""`StepInputs`: from a scheduled batch to the numbers of a step in buffers on the device.

Rows that sample come first in each array: their slots, their lengths and, for decodes, their tokens. What else a prompt
chunk needs, a number a token, is in a second buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.kernels.device_operations import PromptChunk
from tensorweave.kernels.step.reference import FROM_DEVICE, SequenceState, TableUpdate
from tensorweave.workers.engine.device.sequence_tables import Ints, SequenceTables
from tensorweave.workers.engine.device.staging import Staging
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.resources import KVCache

# R rows that sample, padded; E entries of an update; T tokens of prompt chunks; S slots; W blocks of a table

_NUM_ENTRIES: Final = 1024
"""Changes of block tables that a step takes with its other numbers; more are sent before it."""


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Of rows that sample. All int32 on the device, at fixed addresses."""

    slots_R: Tensor
    lengths_R: Tensor
    given_tokens_R: Tensor
    update: TableUpdate


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """Of a step's tokens, chunks first, then decodes: int32 on the device.

    Args:
        token_ids_T: of the chunks alone.
        kv_slots_T: block * P + offset.
        sampled_rows_R: which of the step's tokens sample.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    kv_slots_T: Tensor
    sampled_rows_R: Tensor
    chunks: tuple[PromptChunk, ...]


class StepInputs:
    """Used by one thread."""

    def __init__(
        self, max_rows: int, max_tokens: int, tables: SequenceTables, tokens_per_block: int, device: torch.device
    ) -> None:
        self._tables = tables
        self._tokens_per_block = tokens_per_block
        self._max_rows = max_rows
        self._rows = Staging(3 * max_rows + 2 * _NUM_ENTRIES, device)
        self._prompts = Staging(3 * max_tokens + max_rows, device)
        num_slots, width = tables.tables_SW.shape
        self.state = SequenceState(
            tables_SW=torch.zeros(num_slots, width, dtype=torch.int32, device=device),
            tokens_S=torch.zeros(num_slots, dtype=torch.int32, device=device),
        )
        self._padding_place = tables.padding_slot * width

    def row_inputs(self, num_rows: int, first: int = 0) -> RowInputs:
        """Views of the buffers of rows [first, num_rows), at the same addresses in every step."""
        R, E, device_E = self._max_rows, _NUM_ENTRIES, self._rows.device_E
        slots, lengths, tokens = (device_E[i * R + first : i * R + num_rows] for i in range(3))
        places, blocks = (device_E[3 * R + i * E : 3 * R + (i + 1) * E] for i in range(2))
        return RowInputs(slots, lengths, tokens, TableUpdate(places, blocks))

    def send_rows(self, batch: ScheduledBatch, kv_cache: KVCache, num_padded: int) -> None:
        """Bring slots, lengths and tokens of the rows that sample to the device, and what block tables lack."""
        slots, lengths, tokens = [], [], []
        slot_of, block_ids = self._tables.slot_of, kv_cache.block_ids
        for request, start, length, _ in batch.sampled:
            slots.append(slot_of(request, block_ids(request)))
            lengths.append(start + length)
            known = request.tokens
            tokens.append(known[start] if start < len(known) else FROM_DEVICE)
        R, count = self._max_rows, len(slots)
        host = self._rows.next()
        for i, (numbers, padding) in enumerate(((slots, self._tables.padding_slot), (lengths, 0), (tokens, 0))):
            host[i * R : i * R + count] = numbers
            host[i * R + count : i * R + num_padded] = padding
        places, blocks = self._take_changes()
        first, E = 3 * R, _NUM_ENTRIES
        host[first : first + len(places)] = places
        host[first + len(places) : first + E] = self._padding_place
        host[first + E : first + E + len(blocks)] = blocks
        host[first + E + len(blocks) : first + 2 * E] = 0
        self._rows.send(3 * R + 2 * E)

    def _take_changes(self) -> tuple[Ints, Ints]:
        """At most as many as a step takes; those before are written into the tables now."""
        places, blocks = self._tables.take_changes()
        if len(places) <= _NUM_ENTRIES:
            return places, blocks
        device = self.state.tables_SW.device
        ahead = torch.from_numpy(np.stack([places, blocks])[:, :-_NUM_ENTRIES].copy())
        if device.type == "cuda":
            ahead = ahead.pin_memory().to(device, non_blocking=True)
        self.state.tables_SW.view(-1).index_copy_(0, ahead[0].long(), ahead[1])
        return places[-_NUM_ENTRIES:], blocks[-_NUM_ENTRIES:]

    def send_prompts(self, batch: ScheduledBatch, kv_cache: KVCache) -> PromptInputs:
        """Bring the numbers of a step with prompt chunks to the device. Call it before `send_rows`."""
        host = self._prompts.next()
        num_prompt = sum(row.length for row in batch.context)
        T = num_prompt + len(batch.generation)
        at = 0
        sampled: list[int] = []
        chunks: list[PromptChunk] = []
        for row in batch.context:
            slot = self._tables.slot_of(row.request, kv_cache.block_ids(row.request))
            self._write_chunk(host, at, num_prompt, T, row, slot)
            chunks.append(PromptChunk(at, row.start, row.length, slot))
            at += row.length
            sampled += range(at - row.num_samples, at)
        self._write_decodes(host, num_prompt, T, batch.generation, kv_cache)
        sampled += range(num_prompt, T)
        first = num_prompt + 2 * T
        host[first : first + len(sampled)] = sampled
        device_E = self._prompts.send(first + len(sampled))
        ids, positions, slots, rows = torch.split(device_E, [num_prompt, T, T, len(sampled)])
        return PromptInputs(ids, positions, slots, rows, tuple(chunks))

    def _write_chunk(self, host: Ints, at: int, num_prompt: int, num_tokens: int, row: StepRow, slot: int) -> None:
        P = self._tokens_per_block
        stop = at + row.length
        host[at:stop] = row.request.tokens[row.start : row.stop]
        positions = np.arange(row.start, row.stop, dtype=np.int32)
        host[num_prompt + at : num_prompt + stop] = positions
        blocks = self._tables.tables_SW[slot, positions // P]
        first = num_prompt + num_tokens
        host[first + at : first + stop] = blocks * P + positions % P

    def _write_decodes(
        self, host: Ints, num_prompt: int, num_tokens: int, rows: tuple[StepRow, ...], kv_cache: KVCache
    ) -> None:
        if not rows:
            return
        P = self._tokens_per_block
        positions = np.array([row.start for row in rows], dtype=np.int32)
        slots = [self._tables.slot_of(row.request, kv_cache.block_ids(row.request)) for row in rows]
        blocks = self._tables.tables_SW[slots, positions // P]
        first, stop = num_prompt + num_prompt, num_prompt + num_tokens
        host[first:stop] = positions
        host[stop + num_prompt : stop + num_tokens] = blocks * P + positions % P
