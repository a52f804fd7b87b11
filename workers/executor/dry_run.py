"""`DryRun`: the executor's step loop without a model, which checks what a scheduler and a KV cache manager do to each
other.

It plays the engine by noting which token history each slot of each block holds, so that a block shared wrongly,
overwritten early or copied too late is seen at the first read. For the tests of ours, and of whoever writes a scheduler
or a KV manager of their own.
"""

from __future__ import annotations

from tensorweave.workers.executor.bookkeeping import book_launch, book_result
from tensorweave.workers.executor.scheduler import RequestScheduler
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.result import StepResult


class PlanError(Exception):
    """A scheduler or a KV manager broke a rule; the message says which, at which step."""


class DryRun:
    """Steps requests to their end. The next token is a hash of all before it, so equal prompts continue alike.

    Raises:
        PlanError: from `step` and `run`, at the first rule that is broken.
    """

    def __init__(
        self,
        resources: ResourceManager,
        scheduler: RequestScheduler,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        vocab_size: int = 16,
        step_s: float = 0.01,
    ) -> None:
        self.resources = resources
        self.scheduler = scheduler
        self.active: list[LlmRequest] = []
        self.finished: list[LlmRequest] = []
        self.num_steps = 0
        self.num_computed = 0
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._slots: dict[tuple[int, int], int] = {}
        self._histories: dict[int, list[int]] = {}

    def add(self, request: LlmRequest) -> None:
        self.active.append(request)
        self.active.sort(key=lambda r: (-r.priority, r.order))
        self._histories[request.order] = []

    def cancel(self, request: LlmRequest) -> None:
        request.finish_reason = "cancelled"
        self._end(request)

    def run(self, max_steps: int | None = None) -> None:
        """Step until every request has ended."""
        left = max_steps or 100 + 4 * sum(request.max_len for request in self.active)
        while self.active:
            self._require(left > 0, f"{len(self.active)} requests do not end")
            left -= 1
            self.step()
        self._audit()
        kv = self.resources.kv_cache
        self._require(
            kv.available == kv.num_blocks, f"idle, yet only {kv.available} of {kv.num_blocks} blocks to be had"
        )

    def step(self) -> ScheduledBatch:
        """One step, in the executor's order, with everything checked on the way."""
        self.num_steps += 1
        self.resources.kv_cache.now_s += self._step_s
        batch = self.scheduler.schedule_request(tuple(self.active))
        self._check_plan(batch)
        for request in batch.paused:
            self.resources.free_resources(request)
            request.pause()
        if not batch.is_empty:
            self.resources.prepare_resources(batch)
            self._forward(batch)
            book_launch(batch)
            settled = book_result(batch, self._result(batch))
            self.resources.update_resources(batch)
            for request in settled.ended:
                self._end(request)
        self._audit()
        return batch

    # ---- the rules

    def _check_plan(self, batch: ScheduledBatch) -> None:
        planned = [row.request for row in batch.context + batch.generation] + list(batch.paused)
        orders = [request.order for request in planned]
        self._require(len(set(orders)) == len(orders), "a request is planned twice")
        self._require(set(orders) <= {request.order for request in self.active}, "a planned request is not active")
        self._require(batch.num_tokens <= self._max_num_tokens, f"{batch.num_tokens} tokens are over the budget")
        num_requests = len(batch.context) + len(batch.generation)
        self._require(num_requests <= self._max_batch_size, f"{num_requests} requests are over the budget")
        self._require(bool(orders) or not self.active, "nothing runs though requests wait")
        for request in batch.paused:
            self._require(request.is_started, f"{request.request_id} is paused but has not started")
        for request, start, length, num_samples in batch.generation:
            is_ready = request.state is RequestState.GENERATION
            self._require(is_ready, f"{request.request_id} is to decode before its context is complete")
            is_next = start == request.num_launched and length == num_samples == 1
            self._require(is_next, f"{request.request_id} has a wrong decode {start}+{length}")
        for request, start, length, num_samples in batch.context:
            is_next = request.state is RequestState.WAITING or start == request.num_launched
            is_inside = length > 0 and start + length <= request.context_len
            is_sampled = num_samples == (start + length == request.context_len)
            is_right = is_next and is_inside and is_sampled
            self._require(is_right, f"{request.request_id} has a wrong chunk {start}+{length}")

    def _forward(self, batch: ScheduledBatch) -> None:
        kv = self.resources.kv_cache
        copies = kv.take_copies()
        held = {(c.source, at): self._slots.get((c.source, at), 0) for c in copies for at in range(c.num_tokens)}
        for copy in copies:
            for at in range(copy.num_tokens):
                self._slots[copy.target, at] = held[copy.source, at]
        spans = [(row.request, row.start, row.stop) for row in batch.context + batch.generation]
        written: set[tuple[int, int]] = set()
        for request, start, end in spans:
            history = self._history(request)
            for position in range(start, end):
                slot = self._slot(request, position)
                self._require(slot not in written, f"two requests write slot {slot}")
                written.add(slot)
                self._slots[slot] = history[position]
        for request, _, end in spans:
            history = self._history(request)
            for position in range(end):
                is_own = self._slots.get(self._slot(request, position)) == history[position]
                self._require(is_own, f"{request.request_id} reads another's KV at token {position}")
        self.num_computed += batch.num_tokens

    def _result(self, batch: ScheduledBatch) -> StepResult:
        return StepResult([[self._history(row.request)[row.stop - 1] % self._vocab_size] for row in batch.sampled])

    def _audit(self) -> None:
        wrong = self.resources.kv_cache.audit()
        self._require(not wrong, "; ".join(wrong))

    def _require(self, is_right: bool, rule: str) -> None:
        if not is_right:
            raise PlanError(f"step {self.num_steps}: {rule}")

    # ---- the model's part

    def _slot(self, request: LlmRequest, position: int) -> tuple[int, int]:
        kv = self.resources.kv_cache
        blocks = kv.block_ids(request)
        index, offset = divmod(position, kv.tokens_per_block)
        self._require(index < len(blocks), f"{request.request_id} has no block for token {position}")
        return blocks[index], offset

    def _history(self, request: LlmRequest) -> list[int]:
        """For each token so far, a hash of the salt and all tokens up to it."""
        history = self._histories[request.order]
        for token in request.tokens[len(history) :]:
            before = history[-1] if history else hash(request.cache_salt)
            history.append(hash((before, token)))
        return history

    def _end(self, request: LlmRequest) -> None:
        self.resources.free_resources(request)
        request.state = RequestState.DONE
        self.active.remove(request)
        self.finished.append(request)
