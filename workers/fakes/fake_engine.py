"""Engines without a model. `HashEngine`'s next token is a hash of the whole context, read back through the KV manager's
block tables: a wrong block, a missed copy or a stale reuse changes tokens. `LateEngine` and `ThreadedEngine` are the
same, computed when a result is asked for and on a thread. `EmptyEngine` computes nothing, to measure what a step costs
around it, and `TimedEngine` takes a given time for it on a thread.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo, pack_tokens
from tensorweave.workers.engine.compute_thread import ComputeThread
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine.packing import pack
from tensorweave.workers.step.pending import Later, Pending, PendingTokens, Ready, StepLogits
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.resources import BaseResourceManager, BlockCopy, ResourceManager

_UNWRITTEN = -1
_SURE = 30.0  # logit of the one token: e^-30 is what sampling leaves for any other


def hash_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that `HashEngine` samples after `context`: the expected value in tests that use it."""
    return zlib.crc32(pack_tokens(list(context))) % vocab_size


@dataclass(frozen=True, slots=True)
class HashStep:
    """A launched step: `tables` are the block tables at the launch, by a request's order."""

    batch: ScheduledBatch
    copies: Sequence[BlockCopy]
    tables: Mapping[int, list[int]]
    before: PendingTokens


class HashEngine:
    """Keeps token ids where a model keeps keys and values: block by block, one number a token. A step is computed when
    it is launched.

    `pool` shows them as the keys of one layer with one KV head, so that they can be exchanged like a model's.
    """

    def __init__(
        self, vocab_size: int = 1000, num_blocks: int = 64, tokens_per_block: int = 32, max_seq_len: int = 4096
    ) -> None:
        self.info = ModelInfo(
            "hash", vocab_size, max_seq_len, "float32", tokens_per_block, num_blocks, kv_bytes_per_token=2 * 4
        )
        self.pool = KVPool(1, num_blocks, 1, tokens_per_block, 1, torch.int32, torch.device("cpu"))
        self.progress = 0
        self.resource_managers: tuple[BaseResourceManager, ...] = ()
        self._cache_BP = self.pool.cache[0, :, 0, :, 0].numpy()
        self._cache_BP[:] = _UNWRITTEN

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        kv_cache = resources.kv_cache
        requests = [row.request for row in batch.context + batch.generation]
        tables = {request.order: list(kv_cache.block_ids(request)) for request in requests}
        return self.begin(HashStep(batch, kv_cache.take_copies(), tables, before))

    def begin(self, step: HashStep) -> Pending[StepLogits]:
        return Ready(self.compute(step))

    def compute(self, step: HashStep) -> StepLogits:
        for copy in step.copies:
            self._cache_BP[copy.target, : copy.num_tokens] = self._cache_BP[copy.source, : copy.num_tokens]
        block_size = self.info.tokens_per_block
        packed = pack(step.batch, lambda request: step.tables[request.order], block_size, step.before)
        self._cache_BP[np.divmod(packed.slots, block_size)] = packed.token_ids
        contexts = [
            self._context(step, row.request.order, row.stop - row.num_samples + 1 + wave)
            for wave in range(max((row.num_samples for row in step.batch.sampled), default=0))
            for row in step.batch.sampled
            if wave < row.num_samples
        ]
        rows = [self.logits_after(context) for context in contexts]
        sampled_RV = torch.stack(rows) if rows else torch.zeros(0, self.info.vocab_size)
        return StepLogits(sampled_RV, self._prompt_logits(step))

    def logits_after(self, context: list[int]) -> Tensor:
        """[V]"""
        logits_V = torch.zeros(self.info.vocab_size)
        logits_V[hash_token(context, self.info.vocab_size)] = _SURE
        return logits_V

    def _prompt_logits(self, step: HashStep) -> Iterator[tuple[PromptRead, Tensor]]:
        for read in step.batch.prompt_reads:
            context = self._context(step, read.request.order, read.stop)
            rows = [self.logits_after(context[: position + 1]) for position in range(read.start, read.stop)]
            yield read, torch.stack(rows)

    def _context(self, step: HashStep, order: int, num_tokens: int) -> list[int]:
        tokens: list[int] = self._cache_BP[step.tables[order]].reshape(-1)[:num_tokens].tolist()
        return tokens

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        self._cache_BP[list(block_ids)] = _UNWRITTEN


class PacedEngine(HashEngine):
    """Each step takes at least `step_s`."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self._step_s = step_s

    def compute(self, step: HashStep) -> StepLogits:
        time.sleep(self._step_s)
        return super().compute(step)


class LateEngine(HashEngine):
    """Computes each step as late as can be: when it settles, or when the next one needs its tokens."""

    def begin(self, step: HashStep) -> Pending[StepLogits]:
        return Later(lambda: self.compute(step))


class ThreadedEngine(HashEngine):
    """Computes on a thread of its own, decoding included."""

    def __init__(self, *arguments: Any, **knobs: Any) -> None:
        super().__init__(*arguments, **knobs)
        self._thread = ComputeThread("fake-device")
        self.resource_managers = (self._thread,)

    def begin(self, step: HashStep) -> Pending[StepLogits]:
        return self._thread.submit(lambda: self.compute(step))


class EmptyEngine:
    """Zero logits over a tiny vocabulary, computed at once."""

    progress = 0
    resource_managers: tuple[BaseResourceManager, ...] = ()

    def __init__(
        self, num_blocks: int = 8192, tokens_per_block: int = 32, max_seq_len: int = 4096, vocab_size: int = 8
    ) -> None:
        self.info = ModelInfo("empty", vocab_size, max_seq_len, "float32", tokens_per_block, num_blocks)
        self.pool = KVPool(1, num_blocks, 1, tokens_per_block, 1, torch.int32, torch.device("cpu"))

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        resources.kv_cache.take_copies()
        return Ready(self._logits(batch))

    def _logits(self, batch: ScheduledBatch) -> StepLogits:
        reads = [(read, torch.zeros(read.stop - read.start, self.info.vocab_size)) for read in batch.prompt_reads]
        return StepLogits(torch.zeros(batch.num_samples, self.info.vocab_size), reads)

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        return None


class TimedEngine(EmptyEngine):
    """An empty engine on a device: each step takes `step_s` there, and begins when it is launched and the one before it
    has ended."""

    def __init__(self, step_s: float, **knobs: Any) -> None:
        super().__init__(**knobs)
        self._step_s = step_s
        self._free_s = 0.0
        self._thread = ComputeThread("fake-device")
        self.resource_managers = (self._thread,)

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        resources.kv_cache.take_copies()
        self._free_s = end_s = max(time.perf_counter(), self._free_s) + self._step_s
        return self._thread.submit(lambda: self._logits_at(end_s, batch))

    def _logits_at(self, end_s: float, batch: ScheduledBatch) -> StepLogits:
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return self._logits(batch)
