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

# R and N rows of logits, V vocabulary, S sequence slots

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


class Later(Pending[T]):
    """A value that is computed when it is first asked for, by the thread that asks."""

    __slots__ = ("_compute", "_value")

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute: Callable[[], T] | None = compute
        self._value: T

    def result(self) -> T:
        if self._compute is not None:
            self._value = self._compute()
            self._compute = None
        return self._value

    def then(self, continue_with: Callable[[T], U]) -> Pending[U]:
        return Later(lambda: continue_with(self.result()))


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """What a decoder needs to leave a step's tokens on the device, where the next step reads them.

    Views of buffers of fixed address: a decoder may capture its work in CUDA graphs, one for each `num_padded`. Rows
    from R to `num_padded` are padding: their slot is one that no sequence has, and their logits are any numbers.

    Args:
        slots_R: int32 [num_padded]; the sequence slot of each row.
        positions_R: int32 [num_padded]; the place in its sequence of the token that is drawn, `StepRow.stop`.
        tokens_S: int32; the newest token of each slot. The decoder writes it, and never a negative number.
    """

    slots_R: Tensor
    positions_R: Tensor
    tokens_S: Tensor

    @property
    def num_padded(self) -> int:
        return self.slots_R.shape[0]


@dataclass(slots=True)
class StepLogits:
    """Logits of one step.

    `sampled_RV` is [R, V] float32: a row for each of `ScheduledBatch.sampled` in order, then for those with a second
    sample in order, and so on; the decoder may edit it in place. `prompts` has [N, V] float32 for each of
    `ScheduledBatch.prompt_reads`, in pieces that fit in memory; of a request that wants its embedding, [1, D] float32.
    It is read once, and on every rank to its end: the ranks may compute the pieces together.

    Where `rows` is given, the step is computed on a device meanwhile: tensors are there in the order of its stream, and
    `sampled_RV` has `rows.num_padded` rows, of which the first R count.

    Where the vocabulary is split over ranks, `sampled_RV` has this rank's columns: see `Vocabulary`. `check` is called
    when the device has computed the step, before anything of it is booked: it raises WorkerLost if a rank took no part.
    """

    sampled_RV: Tensor
    prompts: Iterable[tuple[PromptRead, Tensor]] = ()
    rows: DeviceRows | None = None
    check: Callable[[], None] | None = None


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
