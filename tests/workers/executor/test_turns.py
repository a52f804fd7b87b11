"""Requests take turns where several steps are in flight."""

from __future__ import annotations

from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.executor.turns import EveryStep, StageTurns, make_turns, most_in_flight
from tensorweave.workers.step.request import LlmRequest, RequestState


def decoding(order: int, *, is_in_flight: bool) -> LlmRequest:
    request = LlmRequest(f"r{order}", order, [1, 2, 3, 4], 3, SamplingSpec(9), state=RequestState.GENERATION)
    request.num_launched = 4 if is_in_flight else 3
    request.num_computed = 3
    return request


def orders(requests: list[LlmRequest], num_in_flight: int) -> list[int]:
    return [request.order for request in StageTurns(num_in_flight).choose(requests)]


def test_a_step_has_its_share_of_the_requests_whose_token_is_back() -> None:
    ready = [decoding(order, is_in_flight=False) for order in range(5)]
    assert orders(ready, 2) == [0, 1, 2]
    assert orders(ready, 3) == [0, 1]
    away = [decoding(order, is_in_flight=order in (0, 1, 3)) for order in range(5)]
    assert orders(away, 2) == [2, 4]
    assert orders(away, 5) == [2]
    assert orders([], 2) == []


def test_contexts_are_in_every_step() -> None:
    chunk = LlmRequest("r9", 9, [1] * 50, 50, SamplingSpec(9), state=RequestState.CONTEXT)
    chunk.num_launched = 16  # and not settled
    new = LlmRequest("r10", 10, [1] * 50, 50, SamplingSpec(9))
    assert orders([decoding(0, is_in_flight=True), chunk, decoding(1, is_in_flight=False), new], 2) == [9, 1, 10]


def test_as_many_steps_are_in_flight_as_there_are_stages() -> None:
    assert most_in_flight(Mesh(tensor=2), overlaps=False) == 1
    assert most_in_flight(Mesh(pipeline=3), overlaps=False) == 3
    assert most_in_flight(Mesh(pipeline=3), overlaps=True) == 4
    assert isinstance(make_turns(Mesh(tensor=2), overlaps=True), EveryStep)
    assert isinstance(make_turns(Mesh(pipeline=2), overlaps=False), StageTurns)
