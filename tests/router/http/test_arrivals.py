"""Requests that arrive together: a few begin in each pass of the event loop, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tensorweave.router.http.arrivals import Arrivals
from tensorweave.router.http.connections import BoundedHttpProtocol, ConnectionLimits
from tests.router.serving import running, until
from tests.router.skipping_loop import run_skipping, skip

HEAD_S = 30.0
NEVER_S = 1000.0
NUM_POSTS = 40
OK = b"HTTP/1.1 200"


class Held(Arrivals):
    """Nothing begins until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Callable[[], None]] = []

    def begin(self, request: Callable[[], None]) -> None:
        self.requests.append(request)

    def protocol(self, place: int = 0) -> BoundedHttpProtocol:
        found: BoundedHttpProtocol = self.requests[place].__self__  # type: ignore[attr-defined]
        return found

    def release(self) -> None:
        requests, self.requests = self.requests, []
        for request in requests:
            request()


class Recorded:
    """An application that answers with the number of bytes of the body, and records what it has begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append(scope["path"])
        message: Any = {"more_body": True}
        num_bytes = 0
        while message.get("more_body"):
            message = await receive()
            num_bytes += len(message.get("body", b""))
        answer = str(num_bytes).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        self.writer.write(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def answer(self) -> bytes:
        """The body of the answer; empty if the connection was closed without one."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""
        assert head.startswith(OK)
        return await self.reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))


Connect = Callable[[], Awaitable[Client]]


@asynccontextmanager
async def serving(app: Recorded, arrivals: Arrivals, limits: ConnectionLimits) -> AsyncIterator[Connect]:
    clients: list[Client] = []
    protocol = functools.partial(BoundedHttpProtocol, limits, {}, arrivals)
    async with asyncio.timeout(NEVER_S), running(app, protocol) as url:

        async def connect() -> Client:
            clients.append(Client(*await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))))
            return clients[-1]

        try:
            yield connect
        finally:
            for client in clients:
                client.writer.transport.abort()


def run(
    body: Callable[[Connect, Recorded], Awaitable[None]],
    arrivals: Arrivals,
    limits: ConnectionLimits | None = None,
) -> None:
    async def call() -> None:
        app = Recorded()
        async with serving(app, arrivals, limits or ConnectionLimits(head_timeout_s=NEVER_S)) as connect:
            await body(connect, app)

    run_skipping(call())


@pytest.mark.parametrize("most", [1, 3])
def test_a_few_begin_in_each_pass_in_the_order_of_their_arrival(most: int) -> None:
    async def call() -> None:
        arrivals, begun = Arrivals(most), list[int]()
        passes: list[int] = []
        for number in range(7):
            arrivals.begin(functools.partial(begun.append, number))
        while len(begun) < 7:
            passes.append(len(begun))
            await asyncio.sleep(0)
            if len(passes) == 1:
                arrivals.begin(functools.partial(begun.append, 7))
        while len(begun) < 8:
            await asyncio.sleep(0)
        assert begun == list(range(8))
        assert passes == list(range(most, 7, most))
        await asyncio.sleep(0)
        arrivals.begin(functools.partial(begun.append, 8))
        assert begun[-1] == 8  # at once, since none waits

    asyncio.run(call())


def test_a_get_does_not_wait_for_posts_that_came_before_it() -> None:
    async def body(connect: Connect, app: Recorded) -> None:
        posting = [await connect() for _ in range(NUM_POSTS)]
        looking = await connect()
        for client in posting:
            client.send("POST", "/v1/completions", b"{}")
        looking.send("GET", "/metrics")
        assert await looking.answer() == b"0"
        place = app.begun.index("/metrics")
        assert place < NUM_POSTS / 2
        for client in posting:
            assert await client.answer() == b"2"

    run(body, Arrivals(1))


def test_a_client_that_leaves_before_its_turn_has_asked_nothing() -> None:
    held = Held()

    async def body(connect: Connect, app: Recorded) -> None:
        leaving, staying = await connect(), await connect()
        leaving.send("POST", "/left")
        await until(lambda: len(held.requests) == 1)
        staying.send("POST", "/stayed")
        await until(lambda: len(held.requests) == 2)
        leaving.writer.transport.abort()
        await until(held.protocol().transport.is_closing)
        held.release()
        assert await staying.answer() == b"0"
        assert app.begun == ["/stayed"]

    run(body, held)


def test_the_rest_of_a_large_body_waits_too_and_is_whole() -> None:
    held, text = Held(), b"x" * 3_000_000

    async def body(connect: Connect, app: Recorded) -> None:
        client = await connect()
        client.send("POST", "/large", text)
        await until(lambda: bool(held.requests) and held.protocol().flow.read_paused)
        held.release()
        assert await client.answer() == str(len(text)).encode()
        client.send("POST", "/next")  # over the same connection
        await until(lambda: bool(held.requests))
        held.release()
        assert await client.answer() == b"0"
        assert app.begun == ["/large", "/next"]

    run(body, held)


def test_a_request_that_waits_for_its_turn_is_not_given_up() -> None:
    """Neither after the time for a head, nor because many others wait."""
    held = Held()

    async def body(connect: Connect, app: Recorded) -> None:
        clients = []
        for number in range(3):
            clients.append(await connect())
            clients[-1].send("POST", "/")
            await until(lambda: len(held.requests) == number + 1)  # noqa: B023
        await skip(3 * HEAD_S)
        held.release()
        for client in clients:
            assert await client.answer() == b"0"

    run(body, held, ConnectionLimits(head_timeout_s=HEAD_S, max_waiting=1))


def test_half_a_head_counts_among_the_waiting_once_its_turn_is_over() -> None:
    held = Held()

    async def body(connect: Connect, app: Recorded) -> None:
        clients = [await connect()]
        clients[0].writer.write(b"POST / HTTP/1.1\r\n")
        await until(lambda: len(held.requests) == 1)
        clients.append(await connect())
        clients[1].writer.write(b"POST / HTTP/1.1\r\n")
        await until(lambda: len(held.requests) == 2)
        held.release()
        assert await clients[0].answer() == b""
        clients[1].writer.write(b"host: x\r\ncontent-length: 0\r\n\r\n")
        assert await clients[1].answer() == b"0"

    run(body, held, ConnectionLimits(head_timeout_s=NEVER_S, max_waiting=1))
