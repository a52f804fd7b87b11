"""`MixedStep`: a step with prompt chunks and perhaps decodes, over the inputs of one buffer; and its captured sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from tensorweave.kernels.attention.tiles import count_tiles
from tensorweave.kernels.device_operations import DecodeAttention, DecodeRows, DeviceOperations
from tensorweave.workers.engine.device.adapter_places import PlacesAdapters
from tensorweave.workers.engine.device.step_inputs import MixedBuffer, MixedInputs, MixedSize, RowInputs, StepInputs
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.models.device.wide import AllLayers, DecodeLayerAttention, MixedLayerAttention
from tensorweave.workers.step.layer_marks import LayerMarks
from tensorweave.workers.step.tiles import DECODE_ROWS, MOST_CAPTURED_ROWS, prompt_tokens_beside

# T tokens of the step, R rows that sample, D hidden size

_MORE_CHUNKS: Final = 16
"""Chunks of a captured step beyond those that fill whole tiles."""


def mixed_sizes(max_rows: int, max_tokens: int) -> tuple[MixedSize, ...]:
    """Sizes that are captured, ascending: the whole steps of up to `MOST_CAPTURED_ROWS` rows that schedulers plan."""
    sizes = [
        MixedSize(decodes, tokens, min(decodes + _MORE_CHUNKS, max_rows), count_tiles(tokens) + _MORE_CHUNKS)
        for decodes in DECODE_ROWS
        for tokens in prompt_tokens_beside(decodes)
        if decodes <= max_rows and decodes + tokens <= min(max_tokens, MOST_CAPTURED_ROWS)
    ]
    return tuple(sorted(sizes, key=lambda size: (size.num_tokens, size.num_decodes)))


def largest(sizes: Sequence[MixedSize]) -> MixedSize:
    """A size that holds them all."""
    return MixedSize(
        max((size.num_decodes for size in sizes), default=0),
        max((size.num_prompt_tokens for size in sizes), default=0),
        max((size.num_rows for size in sizes), default=0),
        max((size.num_tiles for size in sizes), default=0),
    )


@dataclass(frozen=True, slots=True)
class MixedStep:
    """Launches the kernels; used by one thread. `caches` has the KV of each layer."""

    model: DeviceModel
    operations: DeviceOperations
    buffers: StepBuffers
    inputs: StepInputs
    wide: AllLayers
    caches: Sequence[Tensor]
    adapters: PlacesAdapters

    def run_rows(self, buffer: MixedBuffer, size: MixedSize, marks: LayerMarks) -> None:
        """Leave the logits of the rows that sample."""
        views = buffer.views(size)
        attention = self._begin(views, size, marks)
        rows, of_rows = self.inputs.rows(size.num_rows), None
        if size.num_rows:
            of_rows = DecodeLayerAttention(self._attention(rows))
        hidden_RD = self.wide.of_rows(size.num_tokens, attention, views.sampled_rows_R, of_rows, self.caches)
        if size.num_rows:
            self._write_logits(hidden_RD)

    def run_all(self, buffer: MixedBuffer, size: MixedSize, marks: LayerMarks) -> Tensor:
        """The same; return the hidden states of all tokens after the final norm, [T, D]."""
        views = buffer.views(size)
        hidden_TD = self.wide(size.num_tokens, self._begin(views, size, marks), self.caches)
        if size.num_rows:
            self._write_logits(hidden_TD.index_select(0, views.sampled_rows_R))
        return hidden_TD

    def _begin(self, views: MixedInputs, size: MixedSize, marks: LayerMarks) -> MixedLayerAttention:
        marks.begin()
        state, tokens_T, decodes = self.inputs.state, self.buffers.tokens_T[: size.num_tokens], views.decodes
        first = size.num_decodes
        self.operations.begin_step(decodes.slots_R, decodes.given_tokens_R, state, self.inputs.update, tokens_T[:first])
        tokens_T[first:].copy_(views.token_ids_T)
        places_T = self.buffers.all.places_T[: size.num_tokens]
        self.adapters.begin_step(decodes.places_R, places_T[:first])
        self.adapters.begin_step(views.chunk_places_T, places_T[first:])
        plan = self.operations.plan_prefill(views.tiles_Z4, state)
        decode = self._attention(decodes) if first else None
        slots_T, positions_T = views.kv_slots_T, views.positions_T
        return MixedLayerAttention(self.operations, slots_T, positions_T, plan, decode, first, marks.pass_layer)

    def _attention(self, rows: RowInputs) -> DecodeAttention:
        max_length = self.inputs.max_length
        decode_rows = DecodeRows(rows.slots_R, rows.lengths_R, self.inputs.state, max_length)
        return self.operations.decode_attention(decode_rows, self.model.num_heads, self.caches[0])

    def _write_logits(self, hidden_RD: Tensor) -> None:
        self.operations.product(hidden_RD, self.model.head, self.buffers.logits_RV[: len(hidden_RD)])
