"""A link says when its gang has gone silent, long before it gives the gang up; and a connection that breaks under it is
a lost gang."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tensorweave.cluster import wire
from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.protocol import PROTOCOL_VERSION, GangAddress, GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.cluster.socket_link import SocketLink

INFO = ModelInfo("fake", 10, 100, "float32", 4, 8)


def test_a_link_is_quiet_before_it_is_lost() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.pack_frame("hello", PROTOCOL_VERSION, INFO.to_wire()))
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()  # until the link closes
        writer.close()
        ended.set()

    async def until(link: SocketLink, is_quiet: bool) -> None:
        async with asyncio.timeout(30.0):
            while link.is_quiet is not is_quiet:
                await asyncio.sleep(0.01)

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = await SocketLink.connect(GangAddress("g", 0, "both", "127.0.0.1", port, "secret", INFO), timeout_s=30.0)
        assert not link.is_quiet
        await until(link, True)
        assert link.is_open
        writers[0].write(wire.pack_frame("ping"))
        await until(link, False)
        link.close()
        server.close()
        await asyncio.wait_for(ended.wait(), 30.0)  # else its socket is left to the garbage collector
        await asyncio.sleep(0)

    writers: list[asyncio.StreamWriter] = []
    ended = asyncio.Event()
    asyncio.run(run())


class ClosedWriter:
    """What uvloop does with a transport that has closed before its reader heard of it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.transport = writer.transport

    def write(self, data: bytes) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def first_of(chunks: AsyncIterator[Any]) -> Any:
    return await anext(chunks)


@pytest.mark.parametrize(
    "use",
    [
        lambda link: first_of(link.generate(GenerateRequest("r", [1], SamplingSpec(max_tokens=1)))),
        lambda link: first_of(link.attach("r")),
        lambda link: link.find("r"),
        lambda link: link.stats(),
    ],
)
def test_a_broken_connection_is_a_lost_gang(use: Callable[[SocketLink], Awaitable[Any]]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.pack_frame("hello", PROTOCOL_VERSION, INFO.to_wire()))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        ended.set()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = await SocketLink.connect(GangAddress("g", 0, "both", "127.0.0.1", port, "secret", INFO), timeout_s=30.0)
        link._writer = ClosedWriter(link._writer)  # type: ignore[assignment]
        with pytest.raises(WorkerLost, match="the connection to its leader broke"):
            await use(link)
        assert not link.is_open
        assert link.num_inflight == 0
        link.cancel("r")
        server.close()
        await asyncio.wait_for(ended.wait(), 30.0)
        await asyncio.sleep(0)

    ended = asyncio.Event()
    asyncio.run(run())
