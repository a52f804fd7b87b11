"""What a launched step is until it settles: results that come later, and tokens that nobody on the host has yet.

On a CPU the engine computes a step when it is launched, and its result is `Ready`. Other engines compute meanwhile on a
thread or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from tensorweave.workers.step.plan import PromptRead
from tensorweave.workers.step.request import LlmRequest

# R and N rows of logits, V vocabulary

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")


class Pending(Protocol[T_co]):
    """A value that is being computed. Every call of `result` gives the same one."""

    def result(self) -> T_co:
        """Wait for the value; raises what its computation has raised."""

    def then(self, continue_with: Callable[[T_co], U]) -> Pending[U]:
        """What `continue_with` makes of the value, computed after it in the same place and once."""


class Ready(Pending[T]):
    """A value that is there already."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self) -> T:
        return self._value

    def then(self, continue_with: Callable[[T], U]) -> Pending[U]:
        return Ready(continue_with(self._value))


@dataclass(slots=True)
class StepLogits:
    """Logits of one step.

    `sampled_RV` is [R, V] float32, one row for each sample of `ScheduledBatch.sampled` in order; the decoder may edit
    it in place. `prompts` has [N, V] float32 for each of `ScheduledBatch.prompt_reads`, in pieces that fit in memory.
    It is read once, and on every rank to its end: the ranks may compute the pieces together.
    """

    sampled_RV: Tensor
    prompts: Iterable[tuple[PromptRead, Tensor]] = ()


class PendingTokens(Protocol):
    """The tokens that the step before samples. An engine that keeps each request's newest token on its device needs
    not ask."""

    def token_of(self, request: LlmRequest) -> int:
        """Wait for the newest token of a request that has one pending. Where the step gave the request an error, any
        token: the rest of what is computed for it will be dropped."""


class NothingPending:
    """Every launched step has settled."""

    def token_of(self, request: LlmRequest) -> int:
        raise AssertionError(f"request {request.request_id} has no token pending")
