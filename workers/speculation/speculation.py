"""`DraftedSpeculation`: adds drafts to a plan's decodes, within what the plan leaves free, and learns from what became
of them."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorweave.workers.speculation.drafter import Draft, Drafter
from tensorweave.workers.speculation.pace import DraftPace, RequestPace
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import BaseResourceManager, KVCache
from tensorweave.workers.step.result import StepResult
from tensorweave.workers.step.speculation import DraftCounts


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Of one draft `max_draft_len` tokens, of a step `max_num_tokens` with prompts and decodes, and `max_samples` with
    logits. Nothing is drafted in steps of more than `max_concurrency` requests. Tokens are below `vocab_size`."""

    max_draft_len: int
    max_num_tokens: int
    max_samples: int
    vocab_size: int
    max_concurrency: int | None = None


@dataclass(slots=True)
class _Drafted:
    """A request that has had drafts: `kind` is its last one's, `num_accepted` counts the tokens of all."""

    pace: RequestPace
    kind: int = 0
    num_accepted: int = 0


class AcceptanceWindow:
    """Closes for good once the last `size` requests had fewer accepted draft tokens per step than `threshold` on
    average. A size of 0 never closes."""

    def __init__(self, size: int, threshold: float) -> None:
        self.is_closed = False
        self._threshold = threshold
        self._lengths: collections.deque[float] = collections.deque(maxlen=size)

    def note(self, num_accepted: int, num_steps: int) -> None:
        """A request has ended."""
        lengths = self._lengths
        lengths.append(num_accepted / num_steps)
        if lengths and len(lengths) == lengths.maxlen:
            self.is_closed |= sum(lengths) / len(lengths) < self._threshold


class DraftedSpeculation(BaseResourceManager):
    """A `Speculation`, and a resource manager to learn of requests' ends.

    Drafts take what is left: a step's tokens after all decodes and prompts' chunks, and slots of the KV block that the
    request's newest token goes to. In steps of decodes alone, whose need of blocks is known, they also take the next
    block where one can be had; if it is not needed it comes back when the step settles. So no request is paused or
    waits for drafts.
    """

    def __init__(
        self, drafter: Drafter, limits: DraftLimits, window: AcceptanceWindow, pace: DraftPace, kv_cache: KVCache
    ) -> None:
        self._drafter = drafter
        self._kv_cache = kv_cache
        self._limits = limits
        self._window = window
        self._pace = pace
        self._drafted: dict[LlmRequest, _Drafted] = {}
        self._draft_s = 0.0

    def __len__(self) -> int:
        return len(self._drafted)

    def add_drafts(self, batch: ScheduledBatch) -> ScheduledBatch:
        began_s = time.perf_counter()
        drafted = self._add_drafts(batch)
        self._draft_s = time.perf_counter() - began_s
        return drafted

    def _add_drafts(self, batch: ScheduledBatch) -> ScheduledBatch:
        num_left = min(self._limits.max_num_tokens - batch.num_tokens, self._limits.max_samples - len(batch.sampled))
        if num_left < 1 or not batch.generation or self._rests(batch):
            return batch
        wanted = [(row.request, self._room(row)) for row in batch.generation]
        size, spare = self._kv_cache.tokens_per_block, self._spare_blocks(batch)
        drafts: dict[int, Sequence[int]] = {}
        for row, (request, room), draft in zip(batch.generation, wanted, self._drafter.draft(wanted), strict=True):
            if not draft.tokens:
                continue
            in_block = -row.stop % size
            most = min(room, num_left, in_block + spare * size)
            if tokens := self._choose(request, draft, most, len(batch.generation)):
                drafts[request.order] = tokens
                num_left -= len(tokens)
                spare -= -(-max(0, len(tokens) - in_block) // size)
        if not drafts:
            return batch
        single = [row for row in batch.generation if row.request.order not in drafts]
        drafted = [_lengthen(row, drafts) for row in batch.generation if row.request.order in drafts]
        return replace(batch, generation=(*single, *drafted), drafts=drafts)

    def settle(self, batch: ScheduledBatch, result: StepResult) -> DraftCounts:
        if not batch.drafts:
            return DraftCounts(draft_s=self._draft_s)
        num_drafted = num_accepted = 0
        for row, outcome in zip(batch.sampled, result.rows, strict=True):
            if row.num_samples < 2 or not isinstance(outcome, list):
                continue
            drafted, num_verified, num_right = self._drafted[row.request], row.num_samples - 1, len(outcome) - 1
            drafted.num_accepted += num_right
            self._pace.note(drafted.pace, drafted.kind, num_verified, num_right, row.start + 1)
            num_drafted += num_verified
            num_accepted += num_right
        return DraftCounts(len(batch.drafts), num_drafted, num_accepted, self._draft_s)

    def free_resources(self, request: LlmRequest) -> None:
        drafted = self._drafted.pop(request, None)
        self._drafter.forget(request)
        if drafted is not None and request.finish_reason is not None:
            self._window.note(drafted.num_accepted, max(1, request.num_output - drafted.num_accepted))

    def shutdown(self) -> None:
        self._drafter.close()

    def _rests(self, batch: ScheduledBatch) -> bool:
        most = self._limits.max_concurrency
        is_crowded = most is not None and len(batch.context) + len(batch.generation) > most
        return is_crowded or self._window.is_closed

    def _room(self, row: StepRow) -> int:
        """Most tokens that may be drafted: those before the request's last one. None where logits are told, which come
        in messages of one row."""
        if row.request.sampling.wants_generation_logits:
            return 0
        return min(self._limits.max_draft_len, row.request.max_len - 1 - row.stop)

    def _spare_blocks(self, batch: ScheduledBatch) -> int:
        """Blocks that can be had beyond what the plan takes."""
        if batch.context or batch.fetching:
            return 0
        size = self._kv_cache.tokens_per_block
        return max(0, self._kv_cache.available - sum(row.start % size == 0 for row in batch.generation))

    def _choose(self, request: LlmRequest, draft: Draft, most: int, num_decodes: int) -> Sequence[int]:
        """The part of a draft that is verified. It ends before a stop token, which nothing follows."""
        drafted, num_tokens = self._drafted.get(request), len(request.tokens)
        if drafted is None:
            drafted = self._drafted[request] = _Drafted(self._pace.begin(request.order, num_tokens))
        tokens, stops, vocab_size = draft.tokens[:most], request.sampling.stop_token_ids, self._limits.vocab_size
        num_valid = next((i for i, t in enumerate(tokens) if t in stops or not 0 <= t < vocab_size), len(tokens))
        drafted.kind = draft.kind
        num_worth = self._pace.worth(drafted.pace, draft.kind, num_valid, num_decodes, num_tokens) if num_valid else 0
        return tokens[:num_worth]


def _lengthen(row: StepRow, drafts: dict[int, Sequence[int]]) -> StepRow:
    length = 1 + len(drafts[row.request.order])
    return StepRow(row.request, row.start, length, length)
