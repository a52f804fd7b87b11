"""`ModelEngine` turns a scheduled batch into logits; `PyTorchModelEngine` runs a transformer over the paged KV pool.

The executor calls `forward` once a step on every rank; the engine reads block tables from the KV manager and never
decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.attention.backend import AttentionBackend
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine.packing import PackedBatch, pack
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.transformer import Transformer
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.resources import ResourceManager

# T tokens, D hidden size, H head dim, R and N rows of logits, V vocabulary

PIECE_LOGITS: Final = 4 << 20
"""Logits of a prompt that are computed at a time."""


class ModelEngine(Protocol):
    """`info` says what it runs; `forward` computes one step."""

    @property
    def info(self) -> ModelInfo: ...

    def forward(self, batch: ScheduledBatch, resources: ResourceManager) -> Tensor:
        """Logits [R, V] float32, one row for each of `batch.sampled`, in that order; the caller may edit them in place.

        Carries out the KV manager's pending block copies first, and leaves the keys and values of all the batch's
        tokens in its blocks.
        """
        ...

    def prompt_logits(self, batch: ScheduledBatch) -> Iterator[tuple[PromptRead, Tensor]]:
        """Of the batch that `forward` has just computed: logits [N, V] float32 at the prompt tokens of
        `batch.prompt_reads`, in pieces that fit in memory; every rank takes all of them."""
        ...

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        """Nobody uses these KV blocks, and what was computed there may be NaN: leave none of it."""
        ...


class PyTorchModelEngine:
    """One rank's transformer, its KV pool, and the packing between them and the batch.

    Args:
        model: this rank's share.
        pool: where keys and values live.
        attention: plans the attention of each step.
        rope_table: [max_seq_len, H] float32 cosines and sines.
    """

    def __init__(
        self,
        model: Transformer,
        pool: KVPool,
        attention: AttentionBackend,
        rope_table: Tensor,
        info: ModelInfo,
    ) -> None:
        self.info = info
        self.pool = pool
        self._model = model
        self._attention = attention
        self._rope_table = rope_table
        self._device = rope_table.device
        self._hidden_TD: Tensor | None = None
        self._num_pieces = 0

    @property
    def progress(self) -> int:
        """Grows with every layer, and every piece of a prompt's logits, that is computed. Any thread may look."""
        return self._model.stack.num_layers_done + self._num_pieces

    def forward(self, batch: ScheduledBatch, resources: ResourceManager) -> Tensor:
        kv_cache = resources.kv_cache
        packed = pack(batch, kv_cache.block_ids, self.pool.tokens_per_block)
        with torch.inference_mode():
            self.pool.copy_blocks(kv_cache.take_copies())
            inputs = self._inputs(packed)
            hidden_TD = self._model.forward(inputs, self.pool.layers)
            self._hidden_TD = hidden_TD if batch.prompt_reads else None
            rows_R = torch.tensor(packed.sampled_rows, dtype=torch.int64, device=self._device)
            hidden_RD = hidden_TD.index_select(0, rows_R)
        # Not in inference mode: the decoder changes logits in place.
        with torch.no_grad():
            return self._model.logits(hidden_RD)

    def prompt_logits(self, batch: ScheduledBatch) -> Iterator[tuple[PromptRead, Tensor]]:
        hidden_TD, self._hidden_TD = self._hidden_TD, None
        for read in batch.prompt_reads:
            assert hidden_TD is not None, "nothing was computed"
            for piece in read.split(max(1, PIECE_LOGITS // self.info.vocab_size)):
                with torch.no_grad():
                    logits_NV = self._model.logits(hidden_TD[piece.row : piece.row + piece.stop - piece.start])
                self._num_pieces += 1
                yield piece, logits_NV

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        with torch.inference_mode():
            self.pool.wipe_blocks(block_ids)

    def _inputs(self, packed: PackedBatch) -> ForwardInputs:
        ids_T, positions_T, slots_T = torch.tensor(
            [packed.token_ids, packed.positions, packed.slots], dtype=torch.int64, device=self._device
        )
        return ForwardInputs(
            token_ids_T=ids_T,
            rope_table_TH=self._rope_table.index_select(0, positions_T),
            attention=self._attention.plan(packed.spans, slots_T),
        )
