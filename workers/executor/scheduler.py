"""Which requests run in a step: `CapacityScheduler` (do their KV blocks fit?), then `MicroBatchScheduler` (token and
batch budgets).

Called by the executor once a step on every rank with the same requests; returns a frozen plan and changes nothing. A
pure function of the requests and the KV cache: no clocks, no order of a set. docs/scheduler.md shows how to put a
scheduler of your own in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from tensorweave.cluster.context_length import context_exceeded, prompt_limit_exceeded
from tensorweave.workers.executor.capacity_scheduler import CapacityPolicy, CapacityScheduler
from tensorweave.workers.executor.micro_batch_scheduler import ChunkingPolicy, MicroBatchScheduler
from tensorweave.workers.executor.prompt_share import PromptShare
from tensorweave.workers.executor.turns import EveryStep, Turns
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import KVCache


class RequestScheduler(Protocol):
    def schedule_request(self, active: Sequence[LlmRequest]) -> ScheduledBatch:
        """What the next step computes. `active` are all unfinished requests, the most urgent first."""

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse what could never run. Called from other threads than the step loop's.

        Raises:
            RequestRejected: `param` names the field; of what is too long, ContextTooLong.
        """


class SimpleScheduler:
    """Capacity, then micro-batch. At most `max_batch_size` requests hold blocks, so that each can run in every step.

    `counts_on_ends` must be off where one request may grow faster than others: with drafts, or with `turns`.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        *,
        policy: CapacityPolicy = "GUARANTEED_NO_EVICT",
        max_batch_size: int = 256,
        max_num_tokens: int = 2048,
        enable_chunked_prefill: bool = True,
        chunking_policy: ChunkingPolicy = "FIRST_COME_FIRST_SERVED",
        share: PromptShare | None = None,
        counts_on_ends: bool = True,
        turns: Turns | None = None,
    ) -> None:
        if max_batch_size < 1 or max_num_tokens < 1:
            raise ValueError(f"max_batch_size {max_batch_size} and max_num_tokens {max_num_tokens} must be at least 1")
        max_new_tokens = max_num_tokens if chunking_policy == "FIRST_COME_FIRST_SERVED" else sys.maxsize
        max_requests = min(max_batch_size, max_num_tokens)
        self.capacity = CapacityScheduler(kv_cache, policy, max_requests, counts_on_ends, max_new_tokens)
        self.micro_batch = MicroBatchScheduler(
            max_batch_size,
            max_num_tokens,
            kv_cache.tokens_per_block,
            enable_chunked_prefill,
            chunking_policy,
            share,
        )
        self._turns = turns or EveryStep()
        self._tokens_per_block = kv_cache.tokens_per_block
        self.max_request_tokens = kv_cache.max_request_tokens
        self.max_prompt_tokens = self.max_request_tokens - 1 if enable_chunked_prefill else max_num_tokens

    def schedule_request(self, active: Sequence[LlmRequest]) -> ScheduledBatch:
        plan = self.capacity.schedule_request(active)
        here, fetching = plan.fitting, []
        if plan.starts:
            fetching = [fetch for request in here if (fetch := self._fetch_of(request, plan.starts))]
            away = {row.request.order for row in fetching}
            here = tuple(request for request in here if request.order not in away)
        waiting: list[LlmRequest] = []
        if len(plan.fitting) < len(active):
            waiting = [r for r in active if r.state is RequestState.WAITING and r.order not in plan.starts]
        has_room = plan.has_room or not waiting
        context, generation = self.micro_batch.schedule(
            self._turns.choose(here), plan.starts, waiting, has_room=has_room
        )
        return ScheduledBatch(context, generation, plan.paused, tuple(fetching))

    def _fetch_of(self, request: LlmRequest, starts: Mapping[int, int]) -> StepRow | None:
        """What a new request with a ticket lacks, in whole blocks; None where all but the last token is here, or where
        the prompt must be computed here to be told of."""
        if request.fetch is None or request.sampling.needs_prompt_rows:
            return None
        if request.state is not RequestState.WAITING or request.order not in starts:
            return None
        if starts[request.order] >= request.context_len - 1:
            return None
        start = starts[request.order] // self._tokens_per_block * self._tokens_per_block
        return StepRow(request, start, request.context_len - start, num_samples=0)

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse what needs more KV than there is, or has a prompt over the token budget that must not be split."""
        if num_prompt_tokens + max_tokens > self.max_request_tokens:
            raise context_exceeded(self.max_request_tokens, num_prompt_tokens, max_tokens)
        if num_prompt_tokens > self.max_prompt_tokens:
            raise prompt_limit_exceeded(self.max_prompt_tokens, num_prompt_tokens)
