"""`RequestTable`: another router attaches to requests of a lost one, within their grace."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.link import FoundAttempt
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.workers.fakes.fake_executor import FakeExecutor, fake_output
from tensorweave.workers.leader.request_table import RequestTable
from tests.workers.leader.links import (
    ENDLESS,
    PROMPT,
    collect,
    connect,
    joined_tokens,
    linked,
    make_request,
    run,
    run_with_two_links,
    serving,
    tokens_of,
    until,
)
from tests.workers.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("patient_links")


WITH_LOGPROBS = GenerateRequest("r/d1", PROMPT, SamplingSpec(40, num_logprobs=2), grace_s=WAIT_S)


def with_grace(request_id: str, num_tokens: int, grace_s: float = WAIT_S) -> GenerateRequest:
    return replace(make_request(request_id, num_tokens), grace_s=grace_s)


async def attached_chunks(link: SocketLink, request_id: str) -> list[TokenChunk]:
    return [chunk async for chunk in link.attach(request_id)]


async def find_detached(link: SocketLink, request_id: str) -> FoundAttempt:
    """Find the request once the leader has noticed that its router is lost."""
    found: FoundAttempt | None = None
    async with asyncio.timeout(WAIT_S):
        while (found := await link.find(request_id, WAIT_S)) is None:
            await asyncio.sleep(0.01)
    return found


def test_another_router_attaches_to_a_request_of_a_lost_one() -> None:
    drawn = replace(with_grace("mine/d1", 60), sampling=SamplingSpec(60, temperature=1.0, seed=77))

    async def body() -> None:
        executor.hold()
        lost = await connect(address)
        heard: list[int] = []

        async def hear() -> None:
            async for chunk in lost.generate(drawn):
                heard.extend(chunk.token_ids)

        stream = asyncio.create_task(hear())
        executor.allow(20)
        await until(lambda: len(heard) == 20)
        lost.close()
        with pytest.raises(WorkerLost):
            await stream
        async with linked(address) as link:
            assert await find_detached(link, "mine") == FoundAttempt("mine/d1", 77)
            assert await link.find("other", WAIT_S) is None
            attaching = asyncio.create_task(attached_chunks(link, "mine/d1"))
            await until(lambda: link.num_inflight == 1)
            assert await link.find("mine", WAIT_S) is None, "it is attached"
            with pytest.raises(NotReady, match="nothing to attach to"):
                await attached_chunks(link, "mine/d1")
            executor.hold(False)
            chunks = await attaching
            assert joined_tokens(chunks) == fake_output(PROMPT, 60)
            assert chunks[-1].finish_reason == "length"
            assert link.num_inflight == 0
            assert await link.find("mine", WAIT_S) is None, "its client has received it"
            assert leader.num_kept == 0

    executor = FakeExecutor()
    with serving(executor) as (leader, address):
        run(body)
        assert leader.num_open == 0


def test_equal_request_ids_of_two_routers_have_separate_answers() -> None:
    """A known request id does not give access to the answer of another client, running or complete."""

    async def body() -> None:
        async with linked(address) as one, linked(address) as other:
            executor.hold()
            first = asyncio.create_task(tokens_of(one, with_grace("trace/d1-a", 20)))
            await until(lambda: executor.num_requests == 1)
            assert await other.find("trace", WAIT_S) is None
            second = asyncio.create_task(tokens_of(other, with_grace("trace/d1-b", 20)))
            await until(lambda: executor.num_requests == 2)
            executor.hold(False)
            assert await first == await second == fake_output(PROMPT, 20)
            assert await other.find("trace", WAIT_S) is None
            await until(lambda: leader.num_kept == 0)
            async with contextlib.aclosing(one.generate(with_grace("trace/d1-c", ENDLESS))) as chunks:
                await anext(chunks)
                async with contextlib.aclosing(other.generate(with_grace("trace/d1-d", ENDLESS))) as more:
                    await anext(more)
                other.cancel("trace/d1-c")  # another client's request
                for _ in range(3):
                    await anext(chunks)
            await until(lambda: executor.num_requests == 0)

    executor = FakeExecutor(step_s=0.002)
    with serving(executor) as (leader, address):
        run(body)


def test_an_answer_that_ended_is_found_once_its_router_is_lost() -> None:
    """Until the router confirms that its client has received all of it."""

    async def body() -> None:
        lost = await connect(address)
        chunks = lost.generate(with_grace("mine/d1", 5))
        while (await anext(chunks)).finish_reason is None:
            pass
        async with linked(address) as link:
            assert await link.find("mine", WAIT_S) is None
            lost.close()
            found = await find_detached(link, "mine")
            assert joined_tokens(await attached_chunks(link, found.request_id)) == fake_output(PROMPT, 5)
            await until(lambda: leader.num_kept == 0)
        await chunks.aclose()

    executor = FakeExecutor(step_s=0.002)
    with serving(executor) as (leader, address):
        run(body)


def test_a_resumed_attempt_sends_the_tokens_before_it_too() -> None:
    async def body() -> None:
        lost = await connect(address)
        async with linked(address) as second:
            executor.hold()
            resumed = replace(with_grace("mine/d2", 32), prompt_token_ids=[*PROMPT, 91, 92], num_replayed=2)
            mine = asyncio.create_task(tokens_of(lost, resumed))
            await until(lambda: executor.num_requests == 1)
            executor.allow(10)
            lost.close()
            await asyncio.gather(mine, return_exceptions=True)
            found = await find_detached(second, "mine")
            attaching = asyncio.create_task(attached_chunks(second, found.request_id))
            await until(lambda: second.num_inflight == 1)
            executor.hold(False)
            assert joined_tokens(await attaching) == [91, 92, *fake_output([*PROMPT, 91, 92], 30)]

    executor = FakeExecutor()
    with serving(executor) as (_, address):
        run(body)


def test_requests_are_cancelled_after_their_grace() -> None:
    """Requests with a short grace are removed; those with a long one are kept."""

    async def body() -> None:
        lost = await connect(address)
        requests = [with_grace(f"r{n}", ENDLESS, grace_s=0.4) for n in range(3)]
        requests.append(with_grace("long", ENDLESS))
        streams = [asyncio.create_task(tokens_of(lost, request)) for request in requests]
        offer = replace(with_grace("r3/p1", ENDLESS, grace_s=0.4), offer="ticket")
        ended = [lost.generate(r) for r in (offer, with_grace("over", 2), with_grace("over soon", 2, grace_s=0.4))]
        for stream in ended:
            while (await anext(stream)).finish_reason is None:
                pass
        await until(lambda: executor.num_requests == 4)
        lost.close()
        await asyncio.gather(*streams, return_exceptions=True)
        for stream in ended:
            await stream.aclose()
        async with linked(address) as link:
            await until(lambda: executor.num_requests == 1)
            await until(lambda: leader.num_open == leader.num_kept == 1)
            assert await link.find("long", WAIT_S)
            assert await link.find("over", WAIT_S)
            assert await link.find("over soon", WAIT_S) is None
            with pytest.raises(NotReady, match="nothing to attach to"):
                await attached_chunks(link, "r0")

    executor = FakeExecutor(step_s=0.002)
    with serving(executor) as (leader, address):
        run(body)


def test_a_cancel_ends_a_request_at_once_whatever_its_grace() -> None:
    async def body() -> None:
        async with linked(address) as link, linked(address) as other:
            async with contextlib.aclosing(link.generate(with_grace("a", ENDLESS))) as chunks:
                await anext(chunks)
            await until(lambda: executor.num_requests == 0)
            assert await other.find("a", WAIT_S) is None

    executor = FakeExecutor(step_s=0.001)
    with serving(executor) as (_, address):
        run(body)


def test_a_cancelled_attach_leaves_nothing() -> None:
    async def body() -> None:
        async with linked(address) as link:
            lost = await connect(address)
            stream = asyncio.create_task(tokens_of(lost, with_grace("a", ENDLESS)))
            await until(lambda: executor.num_requests == 1)
            lost.close()
            await asyncio.gather(stream, return_exceptions=True)
            await until(lambda: len(leader._table.clients) == 1)  # the lost one is removed
            attaching = asyncio.create_task(attached_chunks(link, "a"))
            await asyncio.sleep(0)
            attaching.cancel()
            await asyncio.gather(attaching, return_exceptions=True)
            await until(lambda: executor.num_requests == 0)
            assert link.num_inflight == 0

    executor = FakeExecutor(step_s=0.002)
    with serving(executor) as (leader, address):
        run(body)


def test_an_attached_client_gets_the_log_probabilities_too() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        complete = await collect(one, WITH_LOGPROBS)
        executor.hold()
        first = asyncio.create_task(collect(one, WITH_LOGPROBS))
        while not executor.num_requests:
            await asyncio.sleep(0.005)
        executor.allow(10)
        one.close()
        await asyncio.gather(first, return_exceptions=True)
        await find_detached(two, "r")
        attaching = asyncio.create_task(attached_chunks(two, "r"))
        while not two.num_inflight:
            await asyncio.sleep(0.005)
        executor.hold(False)
        again = await attaching
        assert joined_tokens(again) == fake_output(PROMPT, 40)
        assert [p for chunk in again for p in chunk.logprobs] == [p for chunk in complete for p in chunk.logprobs]
        assert sum(len(chunk.logprobs) for chunk in again) == 40

    executor = FakeExecutor()
    run_with_two_links(executor, body)


def test_an_answer_whose_beginning_cannot_be_replayed_is_not_found() -> None:
    """The gang that resumed knows the ids of the earlier tokens, but not their log-probabilities."""
    plain = replace(WITH_LOGPROBS, sampling=SamplingSpec(40), prompt_token_ids=[*PROMPT, 91], num_replayed=1)
    table: RequestTable[int] = RequestTable(lambda request_id: None)

    def can_find(request: GenerateRequest) -> bool:
        table.add(request, 0)
        table.disconnect(0)
        found = table.find_detached("r") is not None
        table.record(TokenChunk(request.request_id, finish_reason="cancelled"))
        return found

    async def check() -> None:
        assert can_find(WITH_LOGPROBS)
        assert can_find(plain)
        assert not can_find(replace(plain, sampling=WITH_LOGPROBS.sampling))
        assert not can_find(replace(plain, sampling=SamplingSpec(40, num_prompt_logprobs=0)))
        assert not can_find(replace(WITH_LOGPROBS, sampling=SamplingSpec(40, wants_generation_logits=True)))

    asyncio.run(check())


def test_kept_log_probabilities_count_as_tokens() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        chunks = await collect(one, WITH_LOGPROBS)
        assert joined_tokens(chunks) == fake_output(PROMPT, 40)
        table: RequestTable[int] = RequestTable(lambda request_id: None, max_kept_tokens=100)
        for request, is_kept in (
            (replace(WITH_LOGPROBS, sampling=SamplingSpec(40)), True),
            (WITH_LOGPROBS, False),
        ):
            table.add(request, 0)
            for chunk in chunks:
                table.record(
                    chunk if request is WITH_LOGPROBS else replace(chunk, logprobs=(), request_id=request.request_id)
                )
            assert (table.num_kept > 0) == is_kept
        table.close()

    run_with_two_links(FakeExecutor(), body)
