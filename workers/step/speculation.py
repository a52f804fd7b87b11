"""What the step loop knows of speculation: `Speculation`, and its Null object `NoSpeculation`.

Called once a step on every rank alike. `workers.speculation` has the real implementation.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.result import StepResult


class DraftCounts(NamedTuple):
    """A step's requests that had drafts, their draft tokens, and those that were accepted. `draft_s` is the time
    that drafting took."""

    num_requests: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    draft_s: float = 0.0


NO_DRAFTS = DraftCounts()


class Speculation(Protocol):
    """Lengthens the decodes of a plan by drafted tokens, and learns how many of them were right."""

    def add_drafts(self, batch: ScheduledBatch) -> ScheduledBatch:
        """Return the plan with drafts. All earlier steps have settled."""

    def settle(self, batch: ScheduledBatch, result: StepResult) -> DraftCounts:
        """Note what became of a step's drafts. Called before its requests take their tokens."""


class NoSpeculation:
    """One token per request and step."""

    def add_drafts(self, batch: ScheduledBatch) -> ScheduledBatch:
        return batch

    def settle(self, batch: ScheduledBatch, result: StepResult) -> DraftCounts:
        return NO_DRAFTS
