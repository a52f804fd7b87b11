"""`AutodeployEngine`: steps of any causal language model of transformers over the paged KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.attention.backend import AttentionShape
from tensorweave.kernels.operations import choose_operations
from tensorweave.workers.autodeploy.attention import Layer, PagedStep, attending
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine.packing import PackedBatch, pack
from tensorweave.workers.step.pending import Pending, PendingTokens, Ready, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.resources import BaseResourceManager, ResourceManager

# T tokens, R and N rows of logits, V vocabulary


class AutodeployEngine:
    """A `ModelEngine`. To the model, the batch is one row of tokens whose positions are given."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[Layer],
        pool: KVPool,
        info: ModelInfo,
        *,
        has_plain_attention: bool = False,
    ) -> None:
        self.info = info
        self.pool = pool
        self.resource_managers: tuple[BaseResourceManager, ...] = ()
        self._model = model
        self._layers = layers
        self._device = pool.cache.device
        first = layers[0]
        K, P, H = first.num_kv_heads, pool.tokens_per_block, first.head_dim
        windows = frozenset(layer.window for layer in layers)
        operations = choose_operations(self._device, pool.cache.dtype, H, has_plain_attention=has_plain_attention)
        self._attention = operations.make_attention(AttentionShape(K, tuple(range(K)), H, P, windows))
        self.progress = 0
        """Grows with every layer that is computed. Any thread may look."""

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        kv_cache = resources.kv_cache
        packed = pack(batch, kv_cache.block_ids, self.pool.tokens_per_block, before)
        self.pool.memory.reach(max(packed.slots) // self.pool.tokens_per_block)
        self.pool.copy_blocks(kv_cache.take_copies())
        reads = batch.prompt_reads
        sizes = [read.stop - read.start for read in reads]
        rows = [range(read.row, read.row + size) for read, size in zip(reads, sizes, strict=True)]
        logits = self.compute(packed, [*packed.sampled_rows, *chain.from_iterable(rows)])
        sampled_RV, *prompts = torch.split(logits, [len(packed.sampled_rows), *sizes])
        return Ready(StepLogits(sampled_RV, zip(reads, prompts, strict=True)))

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        self.pool.wipe_blocks(block_ids)

    def compute(self, packed: PackedBatch, rows: Sequence[int]) -> Tensor:
        """Logits [R, V] float32 at these tokens of the batch."""
        ids_T, positions_T, slots_T = torch.tensor(
            [packed.token_ids, packed.positions, packed.slots], dtype=torch.int64, device=self._device
        )
        plan = self._attention.plan(packed.spans, slots_T)
        step = PagedStep(self._layers, self.pool.layers, plan, self._note_layer)
        with torch.no_grad(), attending(step):
            answer = self._model(
                input_ids=ids_T.unsqueeze(0),
                position_ids=positions_T.unsqueeze(0),
                use_cache=False,
                logits_to_keep=torch.tensor(rows, dtype=torch.int64, device=self._device),
            )
        logits_RV: Tensor = answer.logits[0].to(torch.float32)
        return logits_RV

    def _note_layer(self) -> None:
        self.progress += 1
