"""A leader and links to it, over real sockets in one process. Its executor's tokens are a hash of the context."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from tensorweave.cluster.protocol import GangAddress, GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.workers.fakes.fake_executor import FAKE_INFO, FakeExecutor
from tensorweave.workers.leader.server import LeaderServer
from tests.workers.waiting import WAIT_S

SECRET = "s3cret"
HOST = "127.0.0.1"
PROMPT = [5, 6, 7]
ENDLESS = 10**9


def make_request(request_id: str, num_tokens: int = 4, prompt: list[int] | None = None) -> GenerateRequest:
    return GenerateRequest(request_id, PROMPT if prompt is None else prompt, SamplingSpec(max_tokens=num_tokens))


def address_of(port: int, secret: str = SECRET) -> GangAddress:
    return GangAddress("g0", 0, "both", HOST, port, secret, FAKE_INFO)


@contextlib.contextmanager
def serving(executor: FakeExecutor, **options: int) -> Iterator[tuple[LeaderServer, GangAddress]]:
    leader = LeaderServer(executor, HOST, SECRET, **options)
    try:
        yield leader, address_of(leader.start())
    finally:
        leader.stop(WAIT_S)
        executor.shutdown()


async def connect(address: GangAddress) -> SocketLink:
    return await SocketLink.connect(address, timeout_s=WAIT_S)


@contextlib.asynccontextmanager
async def linked(address: GangAddress) -> AsyncIterator[SocketLink]:
    link = await connect(address)
    try:
        yield link
    finally:
        link.close()


async def tokens_of(link: SocketLink, request: GenerateRequest) -> list[int]:
    return [token async for chunk in link.generate(request) for token in chunk.token_ids]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.005)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await body()

    asyncio.run(bounded())


async def collect(link: SocketLink, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in link.generate(request)]


def joined_tokens(chunks: list[TokenChunk]) -> list[int]:
    """Their tokens, checked against the positions in the chunks."""
    tokens: list[int] = []
    for chunk in chunks:
        assert chunk.start == len(tokens)
        tokens += chunk.token_ids
    return tokens


def run_with_two_links(
    executor: FakeExecutor, body: Callable[[SocketLink, SocketLink], Awaitable[None]], **options: int
) -> None:
    """`body` gets two links to a leader of this executor."""
    with serving(executor, **options) as (_, address):

        async def linked_body() -> None:
            async with linked(address) as one, linked(address) as two:
                await body(one, two)

        run(linked_body)
