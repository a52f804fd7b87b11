"""`SocketLink`: a gang link over a connection to the leader's socket.

It carries many requests at once and subscribes to the gang's KV cache. When the connection ends, or the leader is
silent for 5 s, every open request ends with `WorkerLost`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from tensorweave.cluster import wire
from tensorweave.cluster.chunk_inbox import ChunkInbox
from tensorweave.cluster.errors import (
    NotReady,
    RequestRejected,
    TensorweaveError,
    WireError,
    WorkerLost,
    error_from_wire,
)
from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.cluster.link import FoundAttempt
from tensorweave.cluster.pending_replies import PendingReplies, copy_error
from tensorweave.cluster.protocol import (
    GangAddress,
    GenerateRequest,
    KvSource,
    LinkMeasurement,
    ModelInfo,
    TokenChunk,
)
from tensorweave.cluster.tls import tls_reason

logger = logging.getLogger(__name__)

SILENCE_LIMIT_S: Final = 5.0
QUIET_S: Final = 1.5
_CHECK_INTERVAL_S: Final = 0.25


class SocketLink:
    """Every open request has an inbox; one task reads the socket and fills them. An inbox never holds more than its
    request's tokens, so a slow reader uses no more memory than its answer."""

    def __init__(
        self, address: GangAddress, info: ModelInfo, frames: wire.FrameReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = address
        self._info = info
        self._writer = writer
        self._inboxes: dict[str, ChunkInbox] = {}
        self._replies = PendingReplies()
        self.kv = KvMirror(info.tokens_per_block, info.num_blocks)
        self.kv_links: Mapping[str, LinkMeasurement] = {}
        self._error: TensorweaveError | None = None
        self._closed = asyncio.Event()
        self._closes_when_idle = False
        self._num_silent_checks = 0
        self._task = asyncio.create_task(self._run(frames), name=f"link-{address.gang_id}")
        self._send(wire.pack_frame("kv_subscribe"))

    @classmethod
    async def connect(cls, address: GangAddress, timeout_s: float = 5.0) -> SocketLink:
        """Connect and authenticate. Raises NotReady if the leader does not answer in time, WireError if it refuses, or
        if one end does not accept the other's certificate."""
        try:
            async with asyncio.timeout(timeout_s):
                tls = None if address.tls is None else address.tls.connecting()
                reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls)
                with contextlib.ExitStack() as undo:
                    undo.callback(wire.abort, writer)
                    wire.tune_socket(writer)
                    wire.send_hello(writer, address.secret)
                    frames = wire.FrameReader(reader)
                    info = await wire.read_hello(frames)
                    undo.pop_all()
        except (ssl.SSLError, ValueError) as error:
            why = tls_reason(error) if isinstance(error, OSError) else str(error)
            raise WireError(
                f"gang {address.gang_id}: no TLS with its leader at {address.host}:{address.port}: {why}"
            ) from None
        except (
            OSError,
            RuntimeError,
        ) as error:  # also TimeoutError, and what a transport raises if it was closed meanwhile
            raise NotReady(
                f"gang {address.gang_id}: no answer from its leader at {address.host}:{address.port} within "
                f"{timeout_s} s ({type(error).__name__})"
            ) from error
        return cls(address, info, frames, writer)

    @property
    def gang_id(self) -> str:
        return self.address.gang_id

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def kv_source(self) -> KvSource | None:
        return self.address.kv_source

    @property
    def is_quiet(self) -> bool:
        return self._num_silent_checks * _CHECK_INTERVAL_S >= QUIET_S

    @property
    def num_inflight(self) -> int:
        return len(self._inboxes)

    @property
    def is_open(self) -> bool:
        return self._error is None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        if self._error is not None:
            raise copy_error(self._error)
        assert request.request_id not in self._inboxes, f"request id {request.request_id!r} is already in use"
        try:
            frame = wire.pack_frame("add", request.to_wire())
        except (OverflowError, TypeError) as error:
            raise RequestRejected(f"the request does not fit the protocol: {error}", param="prompt") from error
        inbox = self._inboxes[request.request_id] = ChunkInbox()
        self._send(frame)
        reading = self._read(request.request_id, inbox, is_kept=request.grace_s > 0)
        async with contextlib.aclosing(reading) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _read(self, request_id: str, inbox: ChunkInbox, *, is_kept: bool) -> AsyncGenerator[TokenChunk, None]:
        """An open request's chunks; leaving early cancels it. If the gang keeps the answer in case this process is
        lost, it is told at the end that the answer was received."""
        is_over = False
        try:
            while not is_over:
                chunk = await inbox.get()
                is_over = chunk.is_last
                if chunk.error is not None:
                    raise chunk.error
                yield chunk
        finally:
            self._leave(request_id, needs_cancel=is_kept or not is_over)

    def _leave(self, request_id: str, *, needs_cancel: bool = True) -> None:
        self._inboxes.pop(request_id, None)
        if needs_cancel:
            self.cancel(request_id)
        if self._closes_when_idle and not self._inboxes:
            self._end(WorkerLost(f"gang {self.gang_id}: retired"))

    def cancel(self, request_id: str) -> None:
        if self.is_open:
            self._send(wire.pack_frame("cancel", request_id))

    async def find(self, request_id: str, timeout_s: float = 5.0) -> FoundAttempt | None:
        found = await self._ask("find", timeout_s, request_id)
        return None if found is None else FoundAttempt(*found)

    async def attach(self, request_id: str) -> AsyncGenerator[TokenChunk, None]:
        if self._error is not None:
            raise copy_error(self._error)
        with self._replies.open() as (number, reply):
            self._send(wire.pack_frame("attach", number, request_id))
            try:
                attempt_id, inbox = await reply
            except asyncio.CancelledError:
                if reply.done() and not reply.cancelled() and reply.exception() is None:
                    self._leave(reply.result()[0])
                raise
        async with contextlib.aclosing(self._read(attempt_id, inbox, is_kept=True)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return await self._ask_records("stats", timeout_s)

    async def kv_events(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return await self._ask_records("kv_events", timeout_s)

    async def _ask_records(self, name: str, timeout_s: float) -> list[dict[str, Any]]:
        """All records that the leader has, frame by frame."""
        records: list[dict[str, Any]] = []
        while True:
            some: list[dict[str, Any]] = await self._ask(name, timeout_s)
            records += some
            if len(some) < wire.MAX_RECORDS:
                return records

    async def _ask(self, name: str, timeout_s: float, *fields: Any) -> Any:
        """Send a frame, and return the answer in the leader's frame of the same number."""
        if self._error is not None:
            raise copy_error(self._error)
        with self._replies.open() as (number, reply):
            self._send(wire.pack_frame(name, number, *fields))
            try:
                async with asyncio.timeout(timeout_s):
                    return await reply
            except TimeoutError:
                raise WorkerLost(f"gang {self.gang_id}: no answer to {name!r} within {timeout_s:g} s") from None

    def close_when_idle(self) -> None:
        """Close once the open requests have ended. The caller sends no more requests."""
        self._closes_when_idle = True
        if not self._inboxes:
            self._end(WorkerLost(f"gang {self.gang_id}: retired"))

    async def wait_closed(self) -> None:
        """Wait until the link has ended, for whatever reason, without a timeout."""
        await self._closed.wait()

    def close(self) -> None:
        self._end(WorkerLost(f"gang {self.gang_id}: link closed"))

    # ---- the reading task

    async def _run(self, frames: wire.FrameReader) -> None:
        watcher = asyncio.create_task(self._watch_silence(), name=f"link-silence-{self.gang_id}")
        error: TensorweaveError = WorkerLost(f"gang {self.gang_id}: its leader closed the connection")
        try:
            async for frame in frames:
                self._num_silent_checks = 0
                self._receive(frame)
        except WireError as problem:
            logger.warning("gang %s: %s; closing the link", self.gang_id, problem)
            error = WorkerLost(f"gang {self.gang_id}: its leader broke the protocol ({problem.message})")
        except (TypeError, ValueError, LookupError, AttributeError) as problem:
            logger.warning("gang %s: unreadable frame (%s); closing the link", self.gang_id, type(problem).__name__)
            error = WorkerLost(f"gang {self.gang_id}: its leader broke the protocol")
        finally:
            watcher.cancel()
            self._end(error)

    def _receive(self, frame: wire.Frame) -> None:
        match frame:
            case ["step", chunks]:
                for fields in chunks:
                    chunk = TokenChunk.from_wire(fields)
                    if inbox := self._inboxes.get(chunk.request_id):
                        inbox.put(chunk)
            case ["ping"]:
                pass
            case ["stats" | "kv_events" | "found", number, answer]:
                if (reply := self._replies.find(number)) is not None:
                    reply.set_result(answer)
            case ["attached", number, attempt_id, earlier_tokens]:
                self._open_attached(number, attempt_id, earlier_tokens)
            case ["kv" | "kv_snapshot", *_]:
                if self.kv.apply(frame):
                    self._send(wire.pack_frame("kv_snapshot"))
            case ["error", fields]:
                self._end(error_from_wire(fields))
            case _:
                raise WireError(f"unexpected {frame[0]!r} frame of {len(frame)} elements")

    def _open_attached(self, number: int, attempt_id: str | None, earlier_tokens: list[int]) -> None:
        """Open the attempt's inbox before the next frame is read, since its chunks follow."""
        reply = self._replies.find(number)
        if reply is None:
            if attempt_id is not None and attempt_id not in self._inboxes:
                self.cancel(attempt_id)
        elif attempt_id is None or attempt_id in self._inboxes:
            reply.set_exception(NotReady(f"gang {self.gang_id}: there is nothing to attach to"))
        else:
            inbox = self._inboxes[attempt_id] = ChunkInbox()
            if earlier_tokens:
                inbox.put(TokenChunk(attempt_id, earlier_tokens))
            reply.set_result((attempt_id, inbox))

    async def _watch_silence(self) -> None:
        """Counts intervals without a frame rather than seconds, so that a pause of our own loop is not taken for a
        silent leader."""
        while self._num_silent_checks * _CHECK_INTERVAL_S < SILENCE_LIMIT_S:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            self._num_silent_checks += 1
        self._end(WorkerLost(f"gang {self.gang_id}: its leader was silent for {SILENCE_LIMIT_S:g} s"))

    def _send(self, frame: bytes) -> None:
        """A closed transport may raise before its reader notices; the gang is lost either way."""
        try:
            self._writer.write(frame)
        except (RuntimeError, OSError) as error:
            self._end(WorkerLost(f"gang {self.gang_id}: the connection to its leader broke ({error})"))

    def _end(self, error: TensorweaveError) -> None:
        """End every open request with the error, and close the socket. Only the first call has an effect."""
        if self._error is not None:
            return
        self._error = error
        for request_id, inbox in self._inboxes.items():
            inbox.put(TokenChunk(request_id, error=copy_error(error)))
        self._replies.fail_all(error)
        wire.abort(self._writer)
        self._task.cancel()
        self._closed.set()
