"""Limits for connections without a complete request, which do not affect ordinary clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
import uvicorn.config

from tensorweave.cluster.file_limit import raise_file_limit
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.connections import ConnectionLimits, bound_connections, bounded_protocol
from tests.router.fake_fleet import FakeLink
from tests.router.serving import MODEL, PATIENCE_S, make_app, model_info, running

SOON_S = 0.2
NEVER_S = 1000.0
HEAD = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
BODY = json.dumps({"model": MODEL, "prompt": "a"}).encode()
WHOLE = HEAD % len(BODY) + BODY

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def serve(
    limits: ConnectionLimits, body: Callable[[Callable[[], Awaitable[Streams]]], Awaitable[None]], body_timeout_s: float
) -> None:
    """Run `body` with a function that connects to a server which has these limits."""

    async def call() -> None:
        app = make_app(FakeLink(model_info()), limits=Limits(ready_timeout_s=0.05, body_timeout_s=body_timeout_s))
        async with asyncio.timeout(2 * PATIENCE_S), running(app, bounded_protocol(limits)) as url:
            opened: list[Streams] = []

            async def connect() -> Streams:
                opened.append(await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])))
                return opened[-1]

            try:
                await body(connect)
            finally:
                for _, writer in opened:
                    writer.transport.abort()

    asyncio.run(call())


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the server ends the connection."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def answer_of(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
    return head + await reader.readexactly(int(length.split()[1]))


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /version HTTP/1.1\r\nhost: x\r\n"])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_request_that_never_gets_beyond_its_head_is_ended(start: bytes, is_fresh: bool) -> None:
    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        if not is_fresh:
            writer.write(WHOLE)
            assert (await answer_of(reader)).startswith(b"HTTP/1.1 200")
        writer.write(start or (b"" if is_fresh else b"G"))
        ended = asyncio.create_task(rest_of(reader))
        while not ended.done():  # a byte now and then buys no time
            await asyncio.wait({ended}, timeout=SOON_S / 4)
            if start:
                writer.write(b"\r\n" if start == b"\r\n" else b"a")
        assert await ended == b""

    serve(ConnectionLimits(head_timeout_s=SOON_S, rest_timeout_s=SOON_S), body, NEVER_S)


def test_a_body_that_does_not_come_is_answered_and_its_connection_ended() -> None:
    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(HEAD % 1000)
        answering = asyncio.create_task(answer_of(reader))
        while not answering.done():
            writer.write(b" ")
            await asyncio.wait({answering}, timeout=SOON_S / 4)
        answer = await answering
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_timeout"' in answer
        assert b"connection: close" in answer
        assert await rest_of(reader) == b""

    serve(ConnectionLimits(head_timeout_s=NEVER_S, rest_timeout_s=NEVER_S), body, SOON_S)


def test_a_body_that_nobody_waits_for_has_its_time_too() -> None:
    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write((HEAD % 1000).replace(b"application/json", b"text/plain"))
        assert (await answer_of(reader)).startswith(b"HTTP/1.1 415")
        ended = asyncio.create_task(rest_of(reader))
        while not ended.done():
            writer.write(b" ")
            await asyncio.wait({ended}, timeout=SOON_S / 4)

    serve(ConnectionLimits(head_timeout_s=NEVER_S, rest_timeout_s=SOON_S), body, NEVER_S)


def test_a_head_without_end_is_cut_off() -> None:
    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(b"GET /version HTTP/1.1\r\nx: " + b"a" * 5000)
        assert (await rest_of(reader)).startswith(b"HTTP/1.1 431")

    serve(ConnectionLimits(head_timeout_s=NEVER_S, max_head_bytes=4000), body, NEVER_S)


def test_of_many_idle_connections_the_oldest_make_room() -> None:
    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        used_reader, used = await connect()
        used.write(WHOLE)
        await answer_of(used_reader)
        idle = [await connect() for _ in range(20)]
        for reader, _ in idle[:-4]:
            assert await rest_of(reader) == b""
        for reader, writer in (*idle[-4:], (used_reader, used)):
            writer.write(WHOLE)
            assert (await answer_of(reader)).startswith(b"HTTP/1.1 200")

    serve(ConnectionLimits(head_timeout_s=NEVER_S, max_waiting=4), body, NEVER_S)


def test_clients_that_connect_together_before_they_send_are_all_answered() -> None:
    raise_file_limit()

    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        clients = await asyncio.gather(*(connect() for _ in range(1000)))
        for _, writer in clients:
            writer.write(WHOLE)
        for reader, _ in clients:
            assert (await answer_of(reader)).startswith(b"HTTP/1.1 200")

    serve(ConnectionLimits(head_timeout_s=NEVER_S), body, NEVER_S)


def test_a_large_body_has_its_time_and_so_have_many_requests_of_one_connection() -> None:
    async def body(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        for text in ("a", "b" * 100_000, "c"):
            large = json.dumps({"model": MODEL, "prompt": text}).encode()
            for part in (HEAD % len(large), large[: len(large) // 2], large[len(large) // 2 :]):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(2 * SOON_S)  # longer than a head may take
            assert (await answer_of(reader)).startswith(b"HTTP/1.1 200")

    serve(ConnectionLimits(head_timeout_s=SOON_S, max_head_bytes=4000), body, NEVER_S)


def test_servers_of_this_process_take_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    bound_connections(ConnectionLimits(head_timeout_s=SOON_S))

    async def call() -> None:
        async with running(make_app(FakeLink(model_info()))) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            async with asyncio.timeout(PATIENCE_S):
                assert await rest_of(reader) == b""
            writer.close()

    asyncio.run(call())
