"""`Turns`: which of the requests that fit a step may be in it, where several steps are in flight.

Called by the scheduler. With pipeline stages a request is in one step at a time that samples for it, so requests take
turns; `EveryStep` is the Null object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensorweave.cluster.mesh import Mesh
from tensorweave.workers.step.request import LlmRequest, RequestState


def most_in_flight(mesh: Mesh, *, overlaps: bool) -> int:
    """Steps that are launched and not settled at once: one per stage, and one more where steps overlap."""
    return mesh.pipeline + overlaps


class Turns(Protocol):
    def choose(self, fitting: Sequence[LlmRequest]) -> Sequence[LlmRequest]:
        """The requests of `fitting` that the next step may compute, in the same order."""


class EveryStep:
    """A request may be in every step: the engine has its newest token, or the step before has settled."""

    def choose(self, fitting: Sequence[LlmRequest]) -> Sequence[LlmRequest]:
        return fitting


class StageTurns:
    """Leaves out requests whose newest token has not settled, and lets each step have its share of all decodes.

    Contexts are not limited: chunks of one prompt may be in several steps in flight.
    """

    def __init__(self, num_in_flight: int) -> None:
        self._num_in_flight = num_in_flight

    def choose(self, fitting: Sequence[LlmRequest]) -> Sequence[LlmRequest]:
        decoding = [request for request in fitting if request.state is RequestState.GENERATION]
        share = -(-len(decoding) // self._num_in_flight)
        ready = [request for request in decoding if not request.num_pending]
        chosen = {request.order for request in ready[:share]}
        return [r for r in fitting if r.state is not RequestState.GENERATION or r.order in chosen]


def make_turns(mesh: Mesh, *, overlaps: bool) -> Turns:
    return EveryStep() if mesh.pipeline == 1 else StageTurns(most_in_flight(mesh, overlaps=overlaps))
