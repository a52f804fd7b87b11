"""`ModelEngine` turns a scheduled batch into logits; `PyTorchModelEngine` runs a transformer over the paged KV pool.

The step loop calls `launch` once a step on every rank; the engine reads block tables from the KV manager and never
decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.attention.backend import AttentionBackend
from tensorweave.kernels.lora.reference import Updates
from tensorweave.workers.engine.adapter_rows import NoAdapterRows, PlansUpdates
from tensorweave.workers.engine.compute_thread import ComputePlace, ComputeThread, Here
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine.packing import PackedBatch, pack
from tensorweave.workers.gang.stages import StageLink
from tensorweave.workers.lora.rank_adapter import AdapterReader
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.transformer import Stage, Transformer
from tensorweave.workers.step.pending import Pending, PendingTokens, StepLogits
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.resources import BaseResourceManager, BlockCopy, ResourceManager

# T tokens, D hidden size, W rotated elements of a head, R and N rows of logits, V vocabulary

PIECE_LOGITS: Final = 4 << 20
"""Logits of a prompt that are computed at a time."""


class ModelEngine(Protocol):
    """`info` says what it runs, `pool` is where the KV lives. `progress` grows while a step is computed, however long
    that takes; any thread may look. `resource_managers` are what the engine itself holds for each request."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def pool(self) -> KVPool: ...

    @property
    def progress(self) -> int: ...

    @property
    def resource_managers(self) -> Sequence[BaseResourceManager]: ...

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        """Begin to compute one step. `before` has the tokens that the step before samples, if that has not settled.

        Carries out the KV manager's pending block copies first, and leaves the keys and values of all the batch's
        tokens in its blocks. Steps are computed in the order of their launches.
        """
        ...

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        """Nobody uses these KV blocks, and what was computed there may be NaN: leave none of it."""
        ...


class StepOutput(Protocol):
    """What becomes of a step's hidden states. `num_pieces` grows with what is computed of them."""

    @property
    def num_pieces(self) -> int: ...

    def take(self, hidden_TD: Tensor, sampled_rows_R: Tensor, reads: Sequence[PromptRead]) -> StepLogits: ...


class HeadOutput:
    """The logits of the rows that need them, by the model's output head."""

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        self._model = model
        self._piece_rows = max(1, PIECE_LOGITS // vocab_size)
        self.num_pieces = 0

    def take(self, hidden_TD: Tensor, sampled_rows_R: Tensor, reads: Sequence[PromptRead]) -> StepLogits:
        with torch.inference_mode():
            hidden_RD = hidden_TD.index_select(0, sampled_rows_R)
        # Not in inference mode: the decoder changes logits in place.
        with torch.no_grad():
            logits_RV = self._model.logits(hidden_RD)
        return StepLogits(logits_RV, self._prompt_logits(reads, hidden_TD))

    def _prompt_logits(self, reads: Sequence[PromptRead], hidden_TD: Tensor) -> Iterator[tuple[PromptRead, Tensor]]:
        for read in reads:
            for piece in read.split(self._piece_rows):
                rows_ND = hidden_TD[piece.row : piece.row + piece.stop - piece.start]
                with torch.no_grad():
                    is_embedding = read.request.sampling.wants_embedding
                    told = self._model.embeddings(rows_ND) if is_embedding else self._model.logits(rows_ND)
                self.num_pieces += 1
                yield piece, told


class StageOutput:
    """Sent to the next pipeline stage; there are no logits here."""

    num_pieces = 0

    def __init__(self, stages: StageLink) -> None:
        self._stages = stages

    def take(self, hidden_TD: Tensor, sampled_rows_R: Tensor, reads: Sequence[PromptRead]) -> StepLogits:
        with torch.inference_mode():
            self._stages.send_states(hidden_TD)
        return StepLogits(torch.empty(0, 0))


class PyTorchModelEngine:
    """One rank's transformer, its KV pool, and the packing between them and the batch.

    Args:
        model: this rank's share.
        output: takes the hidden states.
        pool: where keys and values live.
        attention: plans the attention of each step.
        rope_tables: one for each of the model's rotations, [max_seq_len, W] float32: cosines and sines.
        adapter_reader: reads adapters for this model, whose rows `adapter_rows` plans; None: there are none.
        thread: computes the steps, of a pipeline stage; None: they are computed as they are launched.
    """

    def __init__(
        self,
        model: Stage,
        output: StepOutput,
        pool: KVPool,
        attention: AttentionBackend,
        rope_tables: Sequence[Tensor],
        info: ModelInfo,
        adapter_reader: AdapterReader | None = None,
        adapter_rows: PlansUpdates | None = None,
        thread: ComputeThread | None = None,
    ) -> None:
        self.info = info
        self.adapter_reader = adapter_reader
        self._adapter_rows = adapter_rows or NoAdapterRows()
        self.pool = pool
        self.resource_managers: tuple[BaseResourceManager, ...] = () if thread is None else (thread,)
        self._compute_place: ComputePlace = Here() if thread is None else thread
        self._model = model
        self._output = output
        self._attention = attention
        self._rope_tables = tuple(rope_tables)
        self._device = rope_tables[0].device

    @property
    def progress(self) -> int:
        """Grows with every layer, and every piece of a prompt's logits, that is computed. Any thread may look."""
        return self._model.num_layers_done + self._output.num_pieces

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        kv_cache = resources.kv_cache
        packed = pack(batch, kv_cache.block_ids, self.pool.tokens_per_block, before)
        copies = kv_cache.take_copies()
        self.pool.memory.reach(max(packed.slots) // self.pool.tokens_per_block)
        with torch.inference_mode():
            inputs = self._inputs(packed, self._adapter_rows.plan(batch))
            rows_R = torch.tensor(packed.sampled_rows, dtype=torch.int64, device=self._device)
        return self._compute_place.submit(lambda: self._compute(inputs, copies, rows_R, batch.prompt_reads))

    def _compute(
        self, inputs: ForwardInputs, copies: Sequence[BlockCopy], rows_R: Tensor, reads: Sequence[PromptRead]
    ) -> StepLogits:
        with torch.inference_mode():
            self.pool.copy_blocks(copies)
            hidden_TD = self._model.forward(inputs, self.pool.layers)
        return self._output.take(hidden_TD, rows_R, reads)

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        self._compute_place.submit(lambda: self._wipe(list(block_ids)))

    def _wipe(self, block_ids: Sequence[int]) -> None:
        with torch.inference_mode():
            self.pool.wipe_blocks(block_ids)

    def _inputs(self, packed: PackedBatch, updates: Updates) -> ForwardInputs:
        ids_T, positions_T, slots_T = torch.tensor(
            [packed.token_ids, packed.positions, packed.slots], dtype=torch.int64, device=self._device
        )
        return ForwardInputs(
            token_ids_T=ids_T,
            rope_tables=tuple(table.index_select(0, positions_T) for table in self._rope_tables),
            attention=self._attention.plan(packed.spans, slots_T),
            updates=updates,
        )
