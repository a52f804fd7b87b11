"""One request: admission, choice of gangs, deadline, errors, and that no state is left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from tensorweave.cluster.errors import DeadlineExceeded, NotReady, Overloaded, RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeFleet, FakeLink, hash_token
from tests.router.serving import model_info


def request_of(name: str = "r", max_tokens: int = 4, deadline_s: float | None = None) -> GenerateRequest:
    return GenerateRequest(name, [5, 6], SamplingSpec(max_tokens=max_tokens), deadline_s=deadline_s)


async def collect(dispatcher: Dispatcher, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in dispatcher.generate(request)]


def make(*links: FakeLink, limits: Limits | None = None) -> Dispatcher:
    return Dispatcher(FakeFleet(*links), limits=limits or Limits(ready_timeout_s=0.05))


def test_the_tokens_come_through() -> None:
    chunks = asyncio.run(collect(make(FakeLink(model_info())), request_of()))
    context = [5, 6]
    for chunk in chunks:
        assert list(chunk.token_ids) == [hash_token(context, 0, model_info())]
        context += chunk.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]


def test_the_deadline_goes_to_the_gang_and_holds_here() -> None:
    async def run() -> None:
        link = FakeLink(model_info(), step_s=0.04)
        chunks = await collect(make(link), request_of(max_tokens=100, deadline_s=0.15))
        assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "timeout"]
        assert link.requests[0].deadline_s == 0.15
        assert link.cancelled == ["r/d1"]
        with pytest.raises(DeadlineExceeded):
            await collect(make(FakeLink(model_info(), step_s=5)), request_of(deadline_s=0.03))

    run_stepped(run())


def test_no_deadline_is_sent_as_none() -> None:
    link = FakeLink(model_info())
    asyncio.run(collect(make(link, limits=Limits(default_deadline_s=None)), request_of()))
    assert link.requests[0].deadline_s is None


def test_an_id_is_used_once_at_a_time() -> None:
    async def run() -> None:
        dispatcher = make(FakeLink(model_info(), step_s=0.01))
        async with aclosing(dispatcher.generate(request_of())) as first:
            await anext(first)
            with pytest.raises(RequestRejected, match="already in use"):
                await collect(dispatcher, request_of())
        assert await collect(dispatcher, request_of())

    run_stepped(run())


def test_leaving_early_cancels_and_frees_the_place() -> None:
    async def run() -> None:
        link = FakeLink(model_info())
        dispatcher = make(link)
        async with aclosing(dispatcher.generate(request_of(max_tokens=100))) as chunks:
            await anext(chunks)
            assert dispatcher.num_running == 1
        assert (link.cancelled, link.num_inflight, dispatcher.num_running) == (["r/d1"], 0, 0)

    run_stepped(run())


def test_refusals_of_the_gang_pass_and_free_the_place() -> None:
    async def run() -> None:
        for error in (RequestRejected("too long", param="prompt"), Overloaded("full", retry_after_s=3.0)):
            dispatcher = make(FakeLink(model_info(), fail_after=0, error=error))
            with pytest.raises(type(error), match=error.message):
                await collect(dispatcher, request_of())
            assert dispatcher.num_running == 0

    run_stepped(run())


def test_a_request_waits_for_a_gang_for_a_while() -> None:
    async def run() -> None:
        fleet = FakeFleet()
        dispatcher = Dispatcher(fleet, limits=Limits(ready_timeout_s=2))
        asyncio.get_running_loop().call_later(0.05, fleet.add, FakeLink(model_info()))
        assert await collect(dispatcher, request_of())
        with pytest.raises(NotReady):
            await collect(make(), request_of())

    run_stepped(run())


def test_the_line_is_first_come_first_served_and_bounded() -> None:
    async def run() -> None:
        link = FakeLink(model_info(), step_s=0.005)
        dispatcher = make(link, limits=Limits(max_inflight=1, max_queued=3))
        tasks = [asyncio.create_task(collect(dispatcher, request_of(f"r{i}"))) for i in range(4)]
        await asyncio.sleep(0.002)
        assert (dispatcher.num_running, dispatcher.num_waiting) == (1, 3)
        with pytest.raises(Overloaded) as full:
            await collect(dispatcher, request_of("late"))
        assert full.value.retry_after_s is not None
        await asyncio.gather(*tasks)
        assert [request.request_id for request in link.requests] == ["r0/d1", "r1/d1", "r2/d1", "r3/d1"]
        assert (dispatcher.num_running, dispatcher.num_waiting) == (0, 0)

    run_stepped(run())


def test_a_place_in_line_ends_with_its_time() -> None:
    async def run() -> None:
        limits = Limits(max_inflight=1, queue_timeout_s=0.05)
        dispatcher = make(FakeLink(model_info(), step_s=1), limits=limits)
        holder = asyncio.create_task(collect(dispatcher, request_of("holder")))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="waited"):
            await collect(dispatcher, request_of("a"))
        with pytest.raises(DeadlineExceeded):
            await collect(dispatcher, request_of("b", deadline_s=0.02))
        holder.cancel()
        await asyncio.wait({holder})
        assert (dispatcher.num_running, dispatcher.num_waiting) == (0, 0)

    run_stepped(run())
