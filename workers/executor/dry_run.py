"""`DryRun`: the executor's step loop without a model, which checks what a scheduler and a KV cache manager do to each
other.

It plays the engine by noting which token history each slot of each block holds, so that a block shared wrongly,
overwritten early or copied too late is seen at the first read. A step is computed as late as can be, when it settles,
over the block tables of its launch; a block that is given to a request is overwritten at once. For the tests of ours,
and of whoever writes a scheduler or a KV manager of their own.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensorweave.workers.executor.bookkeeping import book_launch, book_result
from tensorweave.workers.executor.scheduler import RequestScheduler
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BlockCopy, ResourceManager
from tensorweave.workers.step.result import StepResult


class PlanError(Exception):
    """A scheduler or a KV manager broke a rule; the message says which, at which step."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that has not settled; `tables` are the block tables at its launch, by a request's order."""

    batch: ScheduledBatch
    copies: Sequence[BlockCopy]
    tables: Mapping[int, list[int]]


class DryRun:
    """Steps requests to their end. The next token is a hash of all before it, so equal prompts continue alike. Up to
    `depth` steps are launched and not settled when the next one is planned.

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
        depth: int = 0,
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
        self._depth = depth
        self._launched: collections.deque[_Launched] = collections.deque()
        self._ended: list[LlmRequest] = []
        self._slots: dict[tuple[int, int], int] = {}
        self._histories: dict[int, list[int]] = {}
        self._seen_tables: dict[int, tuple[list[int], list[int]]] = {}

    @property
    def num_added(self) -> int:
        return len(self._histories)

    def add(self, request: LlmRequest) -> None:
        self.active.append(request)
        self.active.sort(key=lambda r: (-r.priority, r.order))
        self._histories[request.order] = []

    def cancel(self, request: LlmRequest) -> None:
        request.finish_reason = "cancelled"
        self._end(request)
        self._free_ended()

    def run(self, max_steps: int | None = None) -> None:
        """Step until every request has ended."""
        left = max_steps or 100 + 4 * sum(request.max_len for request in self.active)
        while self.active or self._launched:
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
        if batch.paused and self._launched:
            self._settle(0)
            batch = self.scheduler.schedule_request(tuple(self.active))
        self._check_plan(batch)
        for request in batch.paused:
            self.resources.free_resources(request)
            request.pause()
        if not batch.is_empty:
            self._launch(batch)
        self._settle(0 if batch.is_empty else self._depth)
        self._audit()
        return batch

    def _launch(self, batch: ScheduledBatch) -> None:
        kv = self.resources.kv_cache
        rows = batch.context + batch.generation
        num_held = {r.order: len(kv.block_ids(r)) for r, *_ in rows if r.state is not RequestState.WAITING}
        self.resources.prepare_resources(batch)
        tables = {row.request.order: self._table(row.request) for row in rows}
        for row in rows:
            order = row.request.order
            for block in tables[order][max(num_held.get(order, 0), row.start // kv.tokens_per_block) :]:
                self._slots.update({(block, at): 0 for at in range(kv.tokens_per_block)})
        self._launched.append(_Launched(batch, kv.take_copies(), tables))
        if book_launch(batch):
            self._prune()

    def _settle(self, num_left: int) -> None:
        while len(self._launched) > num_left:
            launched = self._launched.popleft()
            settled = book_result(launched.batch, self._result(launched.batch))
            self._forward(launched)
            self.resources.update_resources(launched.batch)
            for request in settled.truncated:
                self.resources.truncate(request, request.num_computed)
            for request in settled.ended:
                self._end(request)
            self._free_ended()

    # ---- the rules

    def _check_plan(self, batch: ScheduledBatch) -> None:
        planned = [row.request for row in batch.context + batch.generation] + list(batch.paused)
        orders = [request.order for request in planned]
        self._require(len(set(orders)) == len(orders), "a request is planned twice")
        self._require(set(orders) <= {request.order for request in self.active}, "a planned request is not active")
        self._require(batch.num_tokens <= self._max_num_tokens, f"{batch.num_tokens} tokens are over the budget")
        num_requests = len(batch.context) + len(batch.generation)
        self._require(num_requests <= self._max_batch_size, f"{num_requests} requests are over the budget")
        self._require(bool(orders or self._launched) or not self.active, "nothing runs though requests wait")
        for request in batch.paused:
            self._require(request.is_started, f"{request.request_id} is paused but has not started")
        for request, start, length, num_samples in batch.generation:
            is_ready = request.state is RequestState.GENERATION
            self._require(is_ready, f"{request.request_id} is to decode before its context is complete")
            is_next = start == request.num_launched and 0 < length == num_samples <= request.max_len - 1 - start
            self._require(is_next, f"{request.request_id} has a wrong decode {start}+{length}")
        for request, start, length, num_samples in batch.context:
            is_next = request.state is RequestState.WAITING or start == request.num_launched
            is_inside = length > 0 and start + length <= request.context_len
            is_sampled = num_samples == (start + length == request.context_len)
            is_right = is_next and is_inside and is_sampled
            self._require(is_right, f"{request.request_id} has a wrong chunk {start}+{length}")

    def _forward(self, launched: _Launched) -> None:
        copies = launched.copies
        held = {(c.source, at): self._slots.get((c.source, at), 0) for c in copies for at in range(c.num_tokens)}
        for copy in copies:
            for at in range(copy.num_tokens):
                self._slots[copy.target, at] = held[copy.source, at]
        rows = launched.batch.context + launched.batch.generation
        written: set[tuple[int, int]] = set()
        for row in rows:
            history = self._history(row.request)
            for position in range(row.start, self._end_of(row)):
                slot = self._slot(launched, row.request, position)
                self._require(slot not in written, f"two requests write slot {slot}")
                written.add(slot)
                self._slots[slot] = history[position]
        for row in rows:
            history = self._history(row.request)
            for position in range(self._end_of(row)):
                is_own = self._slots.get(self._slot(launched, row.request, position)) == history[position]
                self._require(is_own, f"{row.request.request_id} reads another's KV at token {position}")
        self.num_computed += launched.batch.num_tokens

    def _end_of(self, row: StepRow) -> int:
        """Where the tokens of a row end that turned out to be the request's own."""
        request = row.request
        is_dropped = request.state is RequestState.DONE
        return min(row.stop, len(request.tokens)) if is_dropped else request.num_computed

    def _result(self, batch: ScheduledBatch) -> StepResult:
        return StepResult([self._sample(row) for row in batch.sampled])

    def _sample(self, row: StepRow) -> list[int]:
        """The next token, and of a row of several samples those after it, up to one that was not foreseen."""
        before = self._history(row.request)[: row.stop - row.num_samples + 1][-1]
        tokens: list[int] = []
        for _ in range(1 + before % row.num_samples):
            tokens.append(before % self._vocab_size)
            before = hash((before, tokens[-1]))
        return tokens

    def _audit(self) -> None:
        wrong = self.resources.kv_cache.audit()
        self._require(not wrong, "; ".join(wrong))

    def _require(self, is_right: bool, rule: str) -> None:
        if not is_right:
            raise PlanError(f"step {self.num_steps}: {rule}")

    # ---- the model's part

    def _slot(self, launched: _Launched, request: LlmRequest, position: int) -> tuple[int, int]:
        blocks = launched.tables[request.order]
        index, offset = divmod(position, self.resources.kv_cache.tokens_per_block)
        self._require(index < len(blocks), f"{request.request_id} has no block for token {position}")
        return blocks[index], offset

    def _table(self, request: LlmRequest) -> list[int]:
        """A copy of the block table. The list that was seen before must have grown at its end only."""
        table = self.resources.kv_cache.block_ids(request)
        seen, before = self._seen_tables.get(request.order, (table, []))
        is_grown = seen is not table or table[: len(before)] == before
        self._require(is_grown, f"{request.request_id} has a block exchanged or taken away in the same list")
        copied = list(table)
        self._seen_tables[request.order] = (table, copied)
        return copied

    def _history(self, request: LlmRequest) -> list[int]:
        """For each token so far, a hash of the salt and all tokens up to it."""
        history = self._histories[request.order]
        for token in request.tokens[len(history) :]:
            before = history[-1] if history else hash(request.cache_salt)
            history.append(hash((before, token)))
        return history

    def _end(self, request: LlmRequest) -> None:
        request.state = RequestState.DONE
        self._ended.append(request)
        self.finished.append(request)
        self._prune()

    def _prune(self) -> None:
        last_states = (RequestState.CLOSING, RequestState.DONE)
        self.active = [request for request in self.active if request.state not in last_states]

    def _free_ended(self) -> None:
        held = {order for launched in self._launched for order in launched.tables}
        for request in self._ended:
            if request.order not in held:
                self.resources.free_resources(request)
        self._ended = [request for request in self._ended if request.order in held]
