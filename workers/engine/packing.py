"""From a scheduled batch to flat arrays on the host: tokens, positions, cache slots and spans. No tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tensorweave.kernels.attention.backend import Span
from tensorweave.workers.step.pending import PendingTokens
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest


@dataclass(slots=True)
class PackedBatch:
    """One entry a token, chunks first. A slot is block * tokens_per_block + offset; `sampled_rows` need logits."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)


def pack(
    batch: ScheduledBatch,
    block_ids: Callable[[LlmRequest], list[int]],
    tokens_per_block: int,
    before: PendingTokens,
) -> PackedBatch:
    """`block_ids` gives a request's blocks in order; they must reach its last token of this step. `before` has the
    tokens of the step before, if that has not settled: packing waits for it."""
    packed = PackedBatch()
    for request, start, length, num_samples in batch.context:
        stop = start + length
        blocks = block_ids(request)
        packed.spans.append(Span(len(packed.token_ids), length, start, blocks))
        packed.token_ids += request.tokens[start:stop]
        packed.positions += range(start, stop)
        packed.slots += _slots(blocks, start, stop, tokens_per_block)
        end = len(packed.token_ids)
        packed.sampled_rows += range(end - num_samples, end)
    for request, start, length, num_samples in batch.generation:
        assert length == num_samples == 1, "no drafts yet"
        blocks = block_ids(request)
        row = len(packed.token_ids)
        packed.spans.append(Span(row, 1, start, blocks))
        packed.token_ids.append(request.tokens[start] if start < len(request.tokens) else before.token_of(request))
        packed.positions.append(start)
        packed.slots.append(blocks[start // tokens_per_block] * tokens_per_block + start % tokens_per_block)
        packed.sampled_rows.append(row)
    return packed


def _slots(blocks: list[int], start: int, stop: int, tokens_per_block: int) -> list[int]:
    slots: list[int] = []
    for index in range(start // tokens_per_block, -(-stop // tokens_per_block)):
        first = index * tokens_per_block
        shift = blocks[index] * tokens_per_block - first
        slots += range(max(start, first) + shift, min(stop, first + tokens_per_block) + shift)
    return slots
