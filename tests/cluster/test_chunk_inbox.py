"""A request's chunks between a link and its reader: in order, and together where the reader is late."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tensorweave.cluster.chunk_inbox import ChunkInbox
from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.protocol import Logprob, TokenChunk


def told(*chunks: TokenChunk) -> list[TokenChunk]:
    """What a reader gets who comes when all of these are there."""

    async def read() -> list[TokenChunk]:
        inbox = ChunkInbox()
        for chunk in chunks:
            inbox.put(chunk)
        got = []
        while inbox._chunks:
            got.append(await inbox.get())
        return got

    return asyncio.run(read())


def test_a_late_reader_gets_one_chunk() -> None:
    first, second = TokenChunk("r", [5], num_cached_tokens=3), TokenChunk("r", [6, 7], start=1)
    last = TokenChunk("r", [8], "stop", 8, start=3)
    assert told(first) == [first]
    assert told(first, second, last) == [TokenChunk("r", [5, 6, 7, 8], "stop", 8, 3)]
    assert told(first, second, TokenChunk("r", (), "timeout", start=3)) == [
        TokenChunk("r", [5, 6, 7], "timeout", num_cached_tokens=3)
    ]


@pytest.mark.parametrize(
    "later",
    [
        TokenChunk("r", [6], start=0),
        TokenChunk("r", [6], start=2),
        TokenChunk("r", start=1, error=WorkerLost("gone")),
        TokenChunk("r", [6], start=1, logprobs=((Logprob(6, -1.0, 1),),)),
        TokenChunk("r", [6], start=1, logits=b"1234"),
        TokenChunk("r", (), start=1, context_logits=b"1234"),
        TokenChunk("r", [6], start=1, prompt_logprobs=()),
    ],
)
def test_what_is_more_than_the_next_ids_stays_apart(later: TokenChunk) -> None:
    first = TokenChunk("r", [5])
    assert told(first, later) == [first, later]
    if later.error is None:
        after = TokenChunk("r", [9], start=later.start + len(later.token_ids))
        if later.num_extra_bytes or later.prompt_logprobs is not None:
            assert told(later, after) == [later, after]


def test_nothing_is_joined_to_an_end() -> None:
    last = TokenChunk("r", [5], "stop")
    assert told(last, replace(last, start=1)) == [last, replace(last, start=1)]


def test_a_reader_waits_and_may_give_up() -> None:
    async def read() -> None:
        inbox = ChunkInbox()
        reading = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        reading = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        inbox.put(TokenChunk("r", [5]))
        inbox.put(TokenChunk("r", [6], start=1))
        assert list((await reading).token_ids) == [5, 6]

    asyncio.run(read())
