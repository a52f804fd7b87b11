"""Which requests run in a step: `CapacityScheduler` (do their KV blocks fit?), then `MicroBatchScheduler` (token and
batch budgets).

Called by the executor once a step on every rank with the same requests; returns a frozen plan and changes nothing. A
pure function of the requests and the KV cache: no clocks, no order of a set. docs/scheduler.md shows how to put a
scheduler of your own in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from tensorweave.cluster.context_length import context_exceeded, prompt_limit_exceeded
from tensorweave.workers.executor.future_peak import future_peak
from tensorweave.workers.executor.prompt_share import FixedShare, PendingContext, PromptLoad, PromptShare
from tensorweave.workers.executor.turns import EveryStep, Turns
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BlockBudget, KVCache
from tensorweave.workers.step.tiles import whole_tiles

CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"]
ChunkingPolicy = Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"]


class RequestScheduler(Protocol):
    def schedule_request(self, active: Sequence[LlmRequest]) -> ScheduledBatch:
        """What the next step computes. `active` are all unfinished requests, the most urgent first."""

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse what could never run. Called from other threads than the step loop's.

        Raises:
            RequestRejected: `param` names the field; of what is too long, ContextTooLong.
        """


class CapacityPlan(NamedTuple):
    """`fitting` may run, in the order of `active`; `starts` says where the contexts of new ones begin, by `order`. With
    `has_room`, the waiting ones that are not among them would fit, too."""

    fitting: tuple[LlmRequest, ...]
    starts: Mapping[int, int] = MappingProxyType({})
    paused: tuple[LlmRequest, ...] = ()
    has_room: bool = False


class CapacityScheduler:
    """Lets requests in while their KV blocks fit; in order, and nobody passes one that must wait.

    - GUARANTEED_NO_EVICT lets a request in if the blocks of all suffice in every future step, to each one's last token;
      what is in stays in. It counts on every request that decodes to do so in every step, one token at a time. With
      `counts_on_ends` off it counts on no request to end before another has grown.
    - MAX_UTILIZATION counts what the next step needs (of a context all of it, and a block to go on); where that does
      not fit, the last started requests pause.
    - STATIC_BATCH is GUARANTEED_NO_EVICT, but lets requests in only when none runs.

    It lets no more in once those that it has let in have `max_new_tokens` prompt tokens to compute: a step does not
    begin more, and looking at hundreds takes longer than a small model's step.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        policy: CapacityPolicy,
        max_requests: int,
        counts_on_ends: bool = True,
        max_new_tokens: int = sys.maxsize,
    ) -> None:
        self._kv_cache = kv_cache
        self._policy = policy
        self._max_requests = max_requests
        self._counts_on_ends = counts_on_ends
        self._max_new_tokens = max_new_tokens
        # What the first waiting request was refused by, and how many blocks were to be had in the step before.
        self._refused: tuple[int, ...] = ()
        self._num_available = 0

    def schedule_request(self, active: Sequence[LlmRequest]) -> CapacityPlan:
        started = [request for request in active if request.state is not RequestState.WAITING]
        if self._policy == "MAX_UTILIZATION":
            return self._fill(active, started)
        has_room = len(started) < min(len(active), self._max_requests)
        if not has_room or (started and self._policy == "STATIC_BATCH"):
            return CapacityPlan(tuple(started))
        decoding = [request for request in started if request.state is RequestState.GENERATION]
        first = next(request for request in active if request.state is RequestState.WAITING)
        situation = (first.order, first.context_len, len(started), len(decoding))
        num_available, self._num_available = self._num_available, self._kv_cache.available
        if situation == self._refused and self._num_available <= num_available:
            return CapacityPlan(tuple(started))  # nothing has ended since
        budget = self._kv_cache.budget()
        for request in started:
            if request.state is not RequestState.GENERATION:
                budget.reserve(budget.missing(request, request.max_len - 1))
        peak, total = future_peak(decoding, budget.freed(decoding), self._kv_cache.tokens_per_block)
        peak = peak if self._counts_on_ends else total
        budget.reserve(peak)
        plan = self._admit(active, started, budget, headroom=None, num_ending=total - peak)
        self._refused = () if plan.starts else situation
        return plan

    def _fill(self, active: Sequence[LlmRequest], started: list[LlmRequest]) -> CapacityPlan:
        budget = self._kv_cache.budget()
        num_kept, end = 0, len(started)
        while num_kept < end:
            request = started[num_kept]
            is_decoding = request.state is RequestState.GENERATION
            num_missing = budget.missing(request, request.num_tokens if is_decoding else request.context_len)
            while num_missing > budget.num_left and end > num_kept:
                end -= 1
                budget.release(started[end])
            if end > num_kept:
                budget.reserve(num_missing)
                num_kept += 1
        if end < len(started):
            return CapacityPlan(tuple(started[:end]), paused=tuple(started[end:]))
        if len(started) == len(active):
            return CapacityPlan(tuple(started))
        return self._admit(active, started, budget, headroom=self._kv_cache.tokens_per_block)

    def _admit(
        self,
        active: Sequence[LlmRequest],
        started: list[LlmRequest],
        budget: BlockBudget,
        headroom: int | None,
        num_ending: int = 0,
    ) -> CapacityPlan:
        """Let waiting requests in, up to the first that does not fit: context and `headroom` tokens, or all of it.

        The budget counts on `num_ending` blocks that come back when requests end, before others need them. A request
        that uses an ending one's blocks keeps them; it may still fit without counting on ends.
        """
        starts: dict[int, int] = {}
        num_left, num_new_tokens, has_room = self._max_requests - len(started), 0, True
        waiting = iter([r for r in active if r.state is RequestState.WAITING] if num_left > 0 else ())
        for request in waiting:
            num_tokens = request.max_len - 1
            if headroom is not None:
                num_tokens = min(num_tokens, request.context_len + headroom)
            quote = budget.quote(request, num_tokens)
            num_kept = min(quote.num_kept, num_ending)
            if quote.num_blocks + num_kept > budget.num_left:
                has_room = False
                break
            budget.take(quote)
            budget.reserve(num_kept)
            num_ending -= num_kept
            starts[request.order] = quote.start
            num_new_tokens += request.context_len - quote.start if request.fetch is None else 0
            if len(starts) == num_left or num_new_tokens >= self._max_new_tokens:
                break
        if not starts:
            return CapacityPlan(tuple(started))
        rest, size = list(waiting), self._kv_cache.tokens_per_block
        has_room &= len(starts) + len(rest) <= num_left
        has_room = has_room and sum([r.max_len // size + 1 for r in rest]) <= budget.num_left
        fitting = tuple([r for r in active if r.order in starts or r.state is not RequestState.WAITING])
        return CapacityPlan(fitting, starts, has_room=has_room)


class MicroBatchScheduler:
    """Shares a step's budgets: one token for each generation request first, then context chunks, in order.

    A chunk that does not end its context ends on a block boundary, unless not even one block fits in a step's budget;
    and its step holds at most a multiple of `TILE` tokens, if it holds more than 256. A new context is not split if it
    fits whole into the next step and three quarters of this step's tokens are in use: the attention of whole prompts is
    faster, but the products of a step that was planned for 2,048 rows and has 1,300 are slower.
    How many prompt tokens it has beside decodes, `share` says.
    Without chunking a context waits until it fits whole; only one that is longer than any step (after a pause) is
    split.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_num_tokens: int,
        tokens_per_block: int,
        enable_chunked_prefill: bool = True,
        chunking_policy: ChunkingPolicy = "FIRST_COME_FIRST_SERVED",
        share: PromptShare | None = None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._share = share or FixedShare(max_num_tokens)
        self._unit = tokens_per_block
        self._is_chunked = enable_chunked_prefill
        self._is_equal = chunking_policy == "EQUAL_PROGRESS"

    def schedule(
        self,
        fitting: Sequence[LlmRequest],
        starts: Mapping[int, int],
        waiting: Sequence[LlmRequest] = (),
        *,
        has_room: bool = True,
    ) -> tuple[tuple[StepRow, ...], tuple[StepRow, ...]]:
        """Chunks and decodes of the step. `starts` are those of new contexts; `waiting` are other requests, for which
        there is room or not."""
        decoding, fetching = RequestState.GENERATION, RequestState.FETCHING
        generation = StepRow.of_decodes(fitting)
        is_all_decoding = len(generation) == len(fitting)
        del generation[min(self._max_batch_size, self._max_num_tokens) :]
        if is_all_decoding:
            return (), tuple(generation)
        num_left = self._max_batch_size - len(generation)
        contexts = [r for r in fitting if r.state is not decoding and r.state is not fetching]
        pending = [(r, starts.get(r.order, r.num_launched)) for r in contexts[:num_left]]
        limit = self._max_num_tokens
        if generation and pending:
            load = PromptLoad([row[0] for row in generation], pending, waiting, has_room)
            limit = min(limit, len(generation) + self._share.most_tokens(load))
        return tuple(self._chunks(pending, len(generation), limit)), tuple(generation)

    def _chunks(self, pending: Sequence[PendingContext], num_decodes: int, limit: int) -> list[StepRow]:
        """`limit` bounds the step's tokens, decodes included."""
        if not self._is_chunked:
            return self._whole(pending, self._max_num_tokens - num_decodes, num_decodes)
        chunks: list[StepRow] = []
        if self._is_equal and sum(request.context_len - start for request, start in pending) > limit - num_decodes:
            chunks = self._equal(pending, max(whole_tiles(limit, num_decodes) - num_decodes, 0))
        return chunks or self._first_come(pending, num_decodes, limit)

    def _split(self, start: int, num_used: int, limit: int, edge: int, *, has_chunks: bool) -> int:
        """Length of a chunk from `start` that does not end its context, in a step of `num_used` tokens."""
        room = limit - num_used
        to_edge = edge - num_used
        rooms = (to_edge if to_edge >= 0 else room,) if has_chunks else (to_edge, room)
        for each in rooms:
            length = (start + each) // self._unit * self._unit - start
            if length > 0:
                return length
        return 0 if has_chunks else room

    def _whole(self, pending: Sequence[PendingContext], num_tokens: int, num_decodes: int) -> list[StepRow]:
        chunks: list[StepRow] = []
        for request, start in pending:
            length = request.context_len - start
            if length > self._max_num_tokens:
                return chunks or self._first_come([(request, start)], num_decodes, self._max_num_tokens)
            if length > num_tokens:
                break
            chunks.append(StepRow.of_context(request, start, length))
            num_tokens -= length
        return chunks

    def _first_come(self, pending: Sequence[PendingContext], num_decodes: int, limit: int) -> list[StepRow]:
        chunks: list[StepRow] = []
        num_used, edge = num_decodes, whole_tiles(limit, num_decodes)
        for request, start in pending:
            length = request.context_len - start
            if num_used + length > limit:
                is_new = request.state is RequestState.WAITING
                if is_new and num_decodes + length <= limit and 4 * num_used >= 3 * limit:
                    break
                length = self._split(start, num_used, limit, edge, has_chunks=bool(chunks))
                if length:
                    chunks.append(StepRow.of_context(request, start, length))
                break
            chunks.append(StepRow.of_context(request, start, length))
            num_used += length
        return chunks

    def _equal(self, pending: Sequence[PendingContext], num_tokens: int) -> list[StepRow]:
        """Round after round, each context moves on to its next block boundary, or to its end, while that fits."""
        ends = [start for _, start in pending]
        has_moved = True
        while has_moved and num_tokens:
            has_moved = False
            for i, (request, _) in enumerate(pending):
                step = min(ends[i] - ends[i] % self._unit + self._unit, request.context_len) - ends[i]
                if 0 < step <= num_tokens:
                    ends[i] += step
                    num_tokens -= step
                    has_moved = True
        return [
            StepRow.of_context(r, start, end - start)
            for (r, start), end in zip(pending, ends, strict=True)
            if end > start
        ]


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
