"""`CapacityScheduler`: which requests may run in a step, by their KV blocks. The first step of `SimpleScheduler`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from tensorweave.workers.executor.future_peak import future_peak
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BlockBudget, KVCache

CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"]


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
