"""What one step gives: for each row that samples its tokens or why there are none, and what is told beside them.

Made by the decoder without touching the requests; `workers.executor.bookkeeping` books it when the step settles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.protocol import TokenLogprobs
from tensorweave.workers.step.plan import PromptRead
from tensorweave.workers.step.request import TokenExtras

RowResult = list[int] | TensorweaveError
"""One token or more, or the error that the request ends with."""


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What is told of the prompt tokens of `read`: `logprobs` of the tokens after them, `logits` (or the embedding) as
    packed float32 in messages of a limited size, or the `failure` that the request ends with at its first token."""

    read: PromptRead
    logprobs: Sequence[TokenLogprobs] = ()
    logits: Sequence[bytes] = field(default=(), repr=False)
    failure: TensorweaveError | None = None


@dataclass(slots=True)
class StepResult:
    """`rows` are those of `ScheduledBatch.sampled`; `extras` has, for the rows that are told more than their tokens,
    one entry a token. Nobody changes one, but there is one a step, and frozen dataclasses take long to make."""

    rows: Sequence[RowResult] = ()
    extras: Mapping[int, Sequence[TokenExtras]] = field(default_factory=dict)
    prompts: Sequence[PromptResult] = ()
