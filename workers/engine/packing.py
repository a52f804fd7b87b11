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
    """One entry a token, chunks first. A slot is block * tokens_per_block + offset. `sampled_rows` need logits, in the
    order of `StepLogits.sampled_RV`."""

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
        if num_samples:
            packed.sampled_rows.append(len(packed.token_ids) - 1)
    for request, start, length, _ in batch.generation:
        blocks = block_ids(request)
        row = len(packed.token_ids)
        packed.spans.append(Span(row, length, start, blocks))
        packed.token_ids.append(request.tokens[start] if start < len(request.tokens) else before.token_of(request))
        packed.sampled_rows.append(row)
        if length > 1:
            packed.token_ids += batch.drafts[request.order]
            packed.positions += range(start, start + length)
            packed.slots += _slots(blocks, start, start + length, tokens_per_block)
        else:
            packed.positions.append(start)
            packed.slots.append(blocks[start // tokens_per_block] * tokens_per_block + start % tokens_per_block)
    if batch.drafts:
        packed.sampled_rows += _drafted_rows(batch)
    return packed


def _drafted_rows(batch: ScheduledBatch) -> list[int]:
    """The rows of all first drafts, then of all second ones, and so on."""
    row, places = sum(row.length for row in batch.context), []
    for _, _, length, _ in batch.generation:
        places += [(wave, row + wave) for wave in range(1, length)]
        row += length
    return [row for _, row in sorted(places)]


def _slots(blocks: list[int], start: int, stop: int, tokens_per_block: int) -> list[int]:
    slots: list[int] = []
    for index in range(start // tokens_per_block, -(-stop // tokens_per_block)):
        first = index * tokens_per_block
        shift = blocks[index] * tokens_per_block - first
        slots += range(max(start, first) + shift, min(stop, first + tokens_per_block) + shift)
    return slots
