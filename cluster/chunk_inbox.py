"""`ChunkInbox`: the chunks of one request on their way from a link to whoever reads its answer."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence

from tensorweave.cluster.protocol import TokenChunk


class ChunkInbox:
    """Used on one event loop, and read by one task at a time.

    What has come while the reader did something else is handed over as one chunk. A chunk costs a reader about the same
    whatever it holds, so one that is slower than the gang's steps catches up instead of falling behind.
    """

    __slots__ = ("_chunks", "_waiter")

    def __init__(self) -> None:
        self._chunks: collections.deque[TokenChunk] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: TokenChunk) -> None:
        self._chunks.append(chunk)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> TokenChunk:
        """Wait for the next chunk."""
        chunks = self._chunks
        while not chunks:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        first = chunks.popleft()
        if not chunks or not _continues(first, chunks[0]):
            return first
        run = [first]
        while chunks and _continues(run[-1], chunks[0]):
            run.append(chunks.popleft())
        return _joined(run)


def _continues(chunk: TokenChunk, later: TokenChunk) -> bool:
    """Whether both can be told as one: ids alone, one behind the other."""
    is_next = later.start == chunk.start + len(chunk.token_ids)
    return is_next and not chunk.is_last and later.error is None and not (_has_more(chunk) or _has_more(later))


def _has_more(chunk: TokenChunk) -> bool:
    return bool(chunk.logprobs or chunk.prompt_logprobs is not None or chunk.logits or chunk.context_logits)


def _joined(run: Sequence[TokenChunk]) -> TokenChunk:
    first, last = run[0], run[-1]
    token_ids = [token for chunk in run for token in chunk.token_ids]
    num_cached = max(chunk.num_cached_tokens for chunk in run)
    return TokenChunk(first.request_id, token_ids, last.finish_reason, last.stop_reason, num_cached, None, first.start)
