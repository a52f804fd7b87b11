"""`LocalLink`: an executor in this process, seen as a gang link.

The LLM class at one rank uses it in place of a socket: a pump thread takes the executor's chunks and hands each step's
to the event loop at once. Nothing is serialised.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from tensorweave.cluster.chunk_inbox import ChunkInbox
from tensorweave.cluster.errors import NotReady, TensorweaveError, WorkerLost
from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.cluster.link import FoundAttempt
from tensorweave.cluster.protocol import GenerateRequest, KvSource, LinkMeasurement, ModelInfo, TokenChunk
from tensorweave.workers.executor.executor import PyExecutor

_PUMP_WAIT_S = 1.0


class LocalLink:
    """Satisfies `cluster.link.GangLink`. Use it from one event loop only; it owns neither the executor nor the loop.

    There is no second gang to choose, so the KV cache's changes are not followed; and whoever asked for a request ends
    with this process, so there is none to find again.
    """

    gang_id = "local"
    kv_links: Mapping[str, LinkMeasurement] = {}

    def __init__(self, executor: PyExecutor, kv_source: KvSource | None = None) -> None:
        self.kv_source = kv_source
        self.kv = KvMirror(executor.info.tokens_per_block, executor.info.num_blocks)
        self._executor = executor
        self._streams: dict[str, ChunkInbox] = {}
        self._loop = asyncio.get_running_loop()
        self._is_closing = threading.Event()
        self._pump = threading.Thread(target=self._run_pump, name="local-pump", daemon=True)
        self._pump.start()

    @property
    def info(self) -> ModelInfo:
        return self._executor.info

    @property
    def num_inflight(self) -> int:
        return len(self._streams)

    @property
    def is_quiet(self) -> bool:
        return False

    @property
    def is_open(self) -> bool:
        return self._executor.is_alive

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks until the last; leaving early cancels. Raises the error tree."""
        stream = ChunkInbox()
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._streams[request.request_id] = stream
        try:
            self._executor.enqueue_request(request)
        except TensorweaveError:
            del self._streams[request.request_id]
            raise
        is_over = False
        try:
            while not is_over:
                chunk = await stream.get()
                is_over = chunk.is_last
                if chunk.error is not None:
                    raise chunk.error
                yield chunk
        finally:
            del self._streams[request.request_id]
            if not is_over:
                self._executor.cancel_request(request.request_id)

    def cancel(self, request_id: str) -> None:
        self._executor.cancel_request(request_id)

    async def find(self, request_id: str, timeout_s: float = 5.0) -> FoundAttempt | None:
        return None

    async def attach(self, request_id: str) -> AsyncGenerator[TokenChunk, None]:
        raise NotReady("there is nothing to attach to in one's own process")
        yield  # makes this a generator, as the protocol asks

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """Take the executor's iteration stats since the last call."""
        return self._executor.get_latest_iteration_stats()

    async def kv_events(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """Take the executor's KV events since the last call."""
        return self._executor.get_latest_kv_cache_events()

    def close(self) -> None:
        """Stop delivering chunks; open requests end with WorkerLost."""
        self._is_closing.set()
        self._deliver([TokenChunk(request_id, error=WorkerLost("the link was closed")) for request_id in self._streams])

    def join(self, timeout_s: float) -> None:
        """Wait, from any other thread than the loop's, until the chunks of an executor that was shut down are
        delivered."""
        self._pump.join(timeout_s)

    def _run_pump(self) -> None:
        while not self._is_closing.is_set():
            chunks = self._executor.await_responses(timeout_s=_PUMP_WAIT_S)
            if chunks:
                self._loop.call_soon_threadsafe(self._deliver, chunks)
            elif not self._executor.is_alive:
                return

    def _deliver(self, chunks: Sequence[TokenChunk]) -> None:
        for chunk in chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is not None:
                stream.put(chunk)
