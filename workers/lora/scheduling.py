"""`AdapterLimitedScheduler`: at most so many different adapters in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest, RequestState


class Scheduler(Protocol):
    def schedule_request(self, active: Sequence[LlmRequest]) -> ScheduledBatch: ...

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None: ...


class AdapterLimitedScheduler:
    """Shows another scheduler the requests that may run. Where a request waits for others to end because of its
    adapter, those behind it that have adapters wait too, so that its turn comes; those without go on."""

    def __init__(self, scheduler: Scheduler, max_adapters: int) -> None:
        self._scheduler = scheduler
        self._max_adapters = max_adapters

    def schedule_request(self, active: Sequence[LlmRequest]) -> ScheduledBatch:
        return self._scheduler.schedule_request(self._within_limit(active))

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        self._scheduler.check(num_prompt_tokens, max_tokens)

    def _within_limit(self, active: Sequence[LlmRequest]) -> Sequence[LlmRequest]:
        if len({request.adapter_digest for request in active} - {None}) <= self._max_adapters:
            return active
        waiting = RequestState.WAITING
        used = {request.adapter_digest for request in active if request.state is not waiting} - {None}
        shown, is_full = [], False
        for request in active:
            digest = request.adapter_digest
            if request.state is waiting and digest is not None:
                is_full |= digest not in used and len(used) >= self._max_adapters
                if is_full:
                    continue
                used.add(digest)
            shown.append(request)
        return shown
