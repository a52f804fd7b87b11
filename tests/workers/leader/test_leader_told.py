"""Log-probabilities and logits over a leader's socket: much at once, and asked for again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from tensorweave.cluster import wire
from tensorweave.cluster.protocol import GangAddress, GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.workers.fakes.fake_executor import FAKE_INFO, FakeExecutor, fake_output
from tensorweave.workers.leader.request_table import Streams
from tensorweave.workers.leader.server import LeaderServer
from tests.workers.waiting import WAIT_S

HOST, SECRET = "127.0.0.1", "s3cret"
PROMPT = [5, 6, 7]
TOLD = GenerateRequest("r/d1", PROMPT, SamplingSpec(40, num_logprobs=2), grace_s=WAIT_S)


pytestmark = pytest.mark.usefixtures("patient_links")


def serve(executor: FakeExecutor, body: Callable[[SocketLink, SocketLink], Awaitable[None]], **options: int) -> None:
    """`body` gets two links to a leader of this executor."""
    leader = LeaderServer(executor, HOST, SECRET, **options)
    address = GangAddress("g0", 0, "both", HOST, leader.start(), SECRET, FAKE_INFO)

    @contextlib.asynccontextmanager
    async def linked() -> AsyncIterator[SocketLink]:
        link = await SocketLink.connect(address, timeout_s=WAIT_S)
        try:
            yield link
        finally:
            link.close()

    async def run() -> None:
        async with asyncio.timeout(2 * WAIT_S), linked() as one, linked() as two:
            await body(one, two)

    try:
        asyncio.run(run())
    finally:
        leader.stop(WAIT_S)
        executor.shutdown()


async def collect(link: SocketLink, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in link.generate(request)]


async def hear_again(link: SocketLink) -> list[TokenChunk]:
    return [chunk async for chunk in link.attach("r")]


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def test_logits_that_were_asked_for_may_pile_up_and_fit_no_single_frame() -> None:
    """24 chunks of 4 MiB in one step: more than a frame may hold, and far more than an idle client may leave unread."""
    pieces = [bytes([i]) * (4 << 20) for i in range(24)]
    assert sum(map(len, pieces)) > wire.MAX_FRAME_BYTES

    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.hold()
        heard = asyncio.create_task(collect(one, GenerateRequest("r", PROMPT, SamplingSpec(2))))
        while not executor.num_requests:
            await asyncio.sleep(0.005)
        executor.say(*(TokenChunk("r", context_logits=piece) for piece in pieces))
        executor.hold(False)
        chunks = await heard
        assert [chunk.context_logits for chunk in chunks if chunk.context_logits] == pieces
        assert tokens_of(chunks) == fake_output(PROMPT, 2)

    executor = FakeExecutor()
    serve(executor, body, max_unsent_bytes=64 << 10)


def test_who_asks_again_hears_the_log_probabilities_too() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        told = await collect(one, TOLD)
        executor.hold()
        first = asyncio.create_task(collect(one, TOLD))
        while not executor.num_requests:
            await asyncio.sleep(0.005)
        executor.allow(10)
        one.close()
        await asyncio.gather(first, return_exceptions=True)
        while await two.find("r") is None:
            await asyncio.sleep(0.005)
        attaching = asyncio.create_task(hear_again(two))
        while not two.num_inflight:
            await asyncio.sleep(0.005)
        executor.hold(False)
        again = await attaching
        assert tokens_of(again) == fake_output(PROMPT, 40)
        assert [p for chunk in again for p in chunk.logprobs] == [p for chunk in told for p in chunk.logprobs]
        assert sum(len(chunk.logprobs) for chunk in again) == 40

    executor = FakeExecutor()
    serve(executor, body)


def test_an_answer_whose_beginning_cannot_be_told_again_is_not_found() -> None:
    """The gang that took over knows the ids of the tokens before, not their log-probabilities: it is asked anew."""
    plain = replace(TOLD, sampling=SamplingSpec(40), prompt_token_ids=[*PROMPT, 91], num_replayed=1)
    streams: Streams[int] = Streams(lambda request_id: None)

    def is_found(request: GenerateRequest) -> bool:
        streams.open(request, 0)
        streams.lose(0)
        found = streams.find("r") is not None
        streams.note(TokenChunk(request.request_id, finish_reason="cancelled"))
        return found

    async def check() -> None:
        assert is_found(TOLD)
        assert is_found(plain)
        assert not is_found(replace(plain, sampling=TOLD.sampling))
        assert not is_found(replace(plain, sampling=SamplingSpec(40, num_prompt_logprobs=0)))
        assert not is_found(replace(TOLD, sampling=SamplingSpec(40, wants_generation_logits=True)))

    asyncio.run(check())


def test_kept_log_probabilities_weigh_what_they_take() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        chunks = await collect(one, TOLD)
        assert tokens_of(chunks) == fake_output(PROMPT, 40)
        streams: Streams[int] = Streams(lambda request_id: None, max_kept_tokens=100)
        for request, is_kept in ((replace(TOLD, sampling=SamplingSpec(40)), True), (TOLD, False)):
            streams.open(request, 0)
            for chunk in chunks:
                streams.note(chunk if request is TOLD else replace(chunk, logprobs=(), request_id=request.request_id))
            assert (streams.num_kept > 0) == is_kept
        streams.close()

    serve(FakeExecutor(), body)
