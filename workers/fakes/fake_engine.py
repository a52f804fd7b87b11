"""Engines without a model. `HashEngine`'s next token is a hash of the whole context, read back through the KV manager's
block tables: a wrong block, a missed copy or a stale reuse changes tokens. `EmptyEngine` computes nothing, to measure
what a step costs around it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo, pack_tokens
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine.packing import pack
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.resources import KVCache, ResourceManager

_UNWRITTEN = -1
_SURE = 30.0  # logit of the one token: e^-30 is what sampling leaves for any other


def hash_token(context: Sequence[int], vocab_size: int) -> int:
    """What `HashEngine` says after `context`: the oracle of tests that use it."""
    return zlib.crc32(pack_tokens(list(context))) % vocab_size


class HashEngine:
    """Keeps token ids where a model keeps keys and values: block by block, one number a token.

    `pool` shows them as the keys of one layer with one KV head, so that they can be exchanged like a model's.
    """

    def __init__(
        self, vocab_size: int = 1000, num_blocks: int = 64, tokens_per_block: int = 32, max_seq_len: int = 4096
    ) -> None:
        self.info = ModelInfo(
            "hash", vocab_size, max_seq_len, "float32", tokens_per_block, num_blocks, kv_bytes_per_token=2 * 4
        )
        self.pool = KVPool(1, num_blocks, 1, tokens_per_block, 1, torch.int32, torch.device("cpu"))
        self._cache_BP = self.pool.cache[0, :, 0, :, 0].numpy()
        self._cache_BP[:] = _UNWRITTEN
        self._kv_cache: KVCache

    def forward(self, batch: ScheduledBatch, resources: ResourceManager) -> Tensor:
        kv_cache = resources.kv_cache
        for copy in kv_cache.take_copies():
            self._cache_BP[copy.target, : copy.num_tokens] = self._cache_BP[copy.source, : copy.num_tokens]
        packed = pack(batch, kv_cache.block_ids, self.info.tokens_per_block)
        self._cache_BP[np.divmod(packed.slots, self.info.tokens_per_block)] = packed.token_ids
        ends = {span.first_row + span.length - 1: span for span in packed.spans}
        logits_RV = torch.zeros(len(packed.sampled_rows), self.info.vocab_size)
        for i, row in enumerate(packed.sampled_rows):
            context = self._cache_BP[list(ends[row].blocks)].reshape(-1)[: ends[row].stop]
            logits_RV[i, hash_token(context.tolist(), self.info.vocab_size)] = _SURE
        self._kv_cache = kv_cache
        return logits_RV

    def prompt_logits(self, batch: ScheduledBatch) -> Iterator[tuple[PromptRead, Tensor]]:
        for read in batch.prompt_reads:
            context = self._cache_BP[self._kv_cache.block_ids(read.request)].reshape(-1).tolist()
            logits_NV = torch.zeros(read.stop - read.start, self.info.vocab_size)
            for i, position in enumerate(range(read.start, read.stop)):
                logits_NV[i, hash_token(context[: position + 1], self.info.vocab_size)] = _SURE
            yield read, logits_NV

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        self._cache_BP[list(block_ids)] = _UNWRITTEN


class EmptyEngine:
    """Zero logits over a tiny vocabulary."""

    def __init__(
        self, num_blocks: int = 8192, tokens_per_block: int = 32, max_seq_len: int = 4096, vocab_size: int = 8
    ) -> None:
        self.info = ModelInfo("empty", vocab_size, max_seq_len, "float32", tokens_per_block, num_blocks)

    def forward(self, batch: ScheduledBatch, resources: ResourceManager) -> Tensor:
        resources.kv_cache.take_copies()
        return torch.zeros(len(batch.sampled), self.info.vocab_size)

    def prompt_logits(self, batch: ScheduledBatch) -> Iterator[tuple[PromptRead, Tensor]]:
        for read in batch.prompt_reads:
            yield read, torch.zeros(read.stop - read.start, self.info.vocab_size)

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        return None
