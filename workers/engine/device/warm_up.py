"""Steps of requests that nobody has sent: they compile kernels, and show how much memory a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.step.pending import NothingPending
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BlockCopy

_DECODES: Final = (0, 1, 2, 4, 8, 16, 32, 64)
"""Decodes beside chunks: attention is compiled for each way in which it splits the keys of so many rows."""
_CHUNK: Final = 64
_PROMPTS: Final = (384, 256)
"""Products of about so many tokens have kernels of their own (`kernels.linear.cuda_wide`)."""


@dataclass(slots=True)
class OneBlock:
    """Enough of a KV manager for an engine: all sequences are in block 0. What is computed there is of no use."""

    tokens_per_block: int
    tables: dict[int, list[int]] = field(default_factory=dict)

    @property
    def kv_cache(self) -> OneBlock:
        """The engine asks a `ResourceManager` for this."""
        return self

    def block_ids(self, request: LlmRequest) -> list[int]:
        num_blocks = -(-len(request.tokens) // self.tokens_per_block)
        return self.tables.setdefault(request.order, [0] * num_blocks)

    def take_copies(self) -> list[BlockCopy]:
        return []


def run_step(engine: DeviceEngine, num_prompt_tokens: int, num_decodes: int) -> None:
    """Launch a step of prompts that have so many tokens together, and of decodes behind `_CHUNK` tokens each."""
    longest = engine.info.max_seq_len - 1
    lengths = [*_cut(num_prompt_tokens, longest)]
    requests = [_request(order, length) for order, length in enumerate(lengths)]
    decodes = [_request(len(lengths) + i, min(_CHUNK, longest)) for i in range(num_decodes)]
    for request in decodes:
        request.state = RequestState.GENERATION
        request.num_launched = request.num_computed = len(request.tokens) - 1
    batch = ScheduledBatch(
        tuple(StepRow.of_context(request, 0, len(request.tokens)) for request in requests),
        tuple(StepRow.of_decode(request) for request in decodes),
    )
    resources: Any = OneBlock(engine.info.tokens_per_block)
    engine.launch(batch, resources, NothingPending())
    for request in (*requests, *decodes):
        for manager in engine.resource_managers:
            manager.free_resources(request)


def warm_up_mixed_steps(engine: DeviceEngine, max_rows: int, max_tokens: int) -> None:
    """Compile what steps with prompt chunks need. The largest step comes first."""
    run_step(engine, max_tokens, 0)
    for num_tokens in _PROMPTS:
        if num_tokens < max_tokens:
            run_step(engine, num_tokens, 0)
    for num_decodes in _DECODES:
        if num_decodes < min(max_rows, max_tokens):
            run_step(engine, min(_CHUNK, max_tokens - num_decodes), num_decodes)


def _cut(total: int, longest: int) -> Iterator[int]:
    while total > 0:
        yield min(total, longest)
        total -= min(total, longest)


def _request(order: int, num_tokens: int) -> LlmRequest:
    return LlmRequest(f"warm-up-{order}", order, [0] * num_tokens, num_tokens, SamplingSpec(max_tokens=2))
