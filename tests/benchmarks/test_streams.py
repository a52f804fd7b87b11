"""The client's side of `benchmarks/streams.py`: when a stream has begun and ended, and whether as it should."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from benchmarks.streams import Stream, open_streams

PATIENCE_S = 60.0
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def streams_of(pieces: Sequence[bytes], count: int) -> list[Stream]:
    """Streams of a server that answers each request with `pieces` and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    async with asyncio.timeout(PATIENCE_S), await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        streams = await open_streams([port], count, num_prompt=3, max_tokens=2, rate_per_s=10_000.0)
        await asyncio.gather(*(stream.ended for stream in streams))
        return streams


@pytest.mark.parametrize(
    ("pieces", "num_events", "is_whole"),
    [
        ([HEAD, b'data: {"a": 1}\n\ndata: {"a": 2}\n\n', b"data: [DO", b"NE]\n\n"], 2, True),
        ([HEAD, b'data: {"a": 1}\n\n'], 1, False),
        ([b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}"], 0, False),
    ],
)
def test_a_stream_is_whole_if_it_is_done(pieces: Sequence[bytes], num_events: int, is_whole: bool) -> None:
    streams = asyncio.run(streams_of(pieces, count=20))
    assert [len(stream.events_s) for stream in streams] == [num_events] * 20
    assert [stream.ended.result() for stream in streams] == [is_whole] * 20
