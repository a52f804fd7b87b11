"""A link says when its gang has gone silent, long before it gives the gang up."""

from __future__ import annotations

import asyncio
import contextlib

from tensorweave.cluster import wire
from tensorweave.cluster.protocol import PROTOCOL_VERSION, GangAddress, ModelInfo
from tensorweave.cluster.socket_link import SocketLink

INFO = ModelInfo("fake", 10, 100, "float32", 4, 8)


def test_a_link_is_quiet_before_it_is_lost_and_speaks_again() -> None:
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
