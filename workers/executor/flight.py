"""`Flight`: a step that has been launched and has not settled."""

from __future__ import annotations

from tensorweave.workers.step.pending import Pending
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.result import StepResult


class Flight:
    """Satisfies `PendingTokens` for the step that is launched next. `launched_s` is the agreed time of its launch.
    `pending` is there once its logits are decoded or will be."""

    __slots__ = ("_orders", "_places", "batch", "launched_s", "pending")

    def __init__(self, batch: ScheduledBatch, launched_s: float) -> None:
        self.batch = batch
        self.launched_s = launched_s
        self.pending: Pending[StepResult]
        self._places: dict[int, int] | None = None
        self._orders: frozenset[int] | None = None

    def result(self) -> StepResult:
        return self.pending.result()

    def holds(self, request: LlmRequest) -> bool:
        """Whether the step computes tokens of this request."""
        if self._orders is None:
            self._orders = frozenset(row.request.order for row in self.batch.context + self.batch.generation)
        return request.order in self._orders

    def token_of(self, request: LlmRequest) -> int:
        if self._places is None:
            self._places = {row.request.order: place for place, row in enumerate(self.batch.sampled)}
        outcome = self.pending.result().rows[self._places[request.order]]
        return outcome[-1] if isinstance(outcome, list) else 0
