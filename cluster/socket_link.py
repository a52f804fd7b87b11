"""`SocketLink`: a gang link that speaks to a leader's socket.

It carries many requests at once and follows the gang's KV cache. Its end, or 5 s of silence from the leader, ends every
open request with `WorkerLost`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster import wire
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
from tensorweave.cluster.protocol import (
    PROTOCOL_VERSION,
    GangAddress,
    GenerateRequest,
    KvSource,
    LinkMeasurement,
    ModelInfo,
    TokenChunk,
)

logger = logging.getLogger(__name__)

SILENCE_LIMIT_S: Final = 5.0
QUIET_S: Final = 1.5
_BEAT_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Attaching:
    """`opened` tells which attempt it is."""

    opened: asyncio.Future[str]
    inbox: asyncio.Queue[TokenChunk] = field(default_factory=asyncio.Queue)


class SocketLink:
    """A connection to one gang's leader.

    Every open request has a queue; one task reads the socket and fills them. A queue never holds more than its
    request's tokens, so a reader that lags costs no more than its answer.
    """

    def __init__(
        self, address: GangAddress, info: ModelInfo, frames: wire.FrameReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = address
        self._info = info
        self._writer = writer
        self._inboxes: dict[str, asyncio.Queue[TokenChunk]] = {}
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._attaching: dict[int, _Attaching] = {}
        self._numbers = itertools.count()
        self.kv = KvMirror(info.tokens_per_block, info.num_blocks)
        self.kv_links: Mapping[str, LinkMeasurement] = {}
        self._error: TensorweaveError | None = None
        self._closed = asyncio.Event()
        self._closes_when_idle = False
        self._num_silent_beats = 0
        self._task = asyncio.create_task(self._run(frames), name=f"link-{address.gang_id}")
        self._send(wire.pack_frame("kv_subscribe"))

    @classmethod
    async def connect(cls, address: GangAddress, timeout_s: float = 5.0) -> SocketLink:
        """Connect and greet. Raises NotReady if the leader does not answer in time, WireError if it refuses us."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                with contextlib.ExitStack() as undo:
                    undo.callback(wire.abort, writer)
                    wire.tune_socket(writer)
                    wire.send_hello(writer, address.secret)
                    frames = wire.FrameReader(reader)
                    info = await _read_greeting(frames)
                    undo.pop_all()
        except (OSError, RuntimeError) as error:  # TimeoutError, and what a transport raises that has closed meanwhile
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
        return self._num_silent_beats * _BEAT_S >= QUIET_S

    @property
    def num_inflight(self) -> int:
        return len(self._inboxes)

    @property
    def is_open(self) -> bool:
        return self._error is None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        if self._error is not None:
            raise _copy(self._error)
        assert request.request_id not in self._inboxes, f"request id {request.request_id!r} is already in use"
        try:
            frame = wire.pack_frame("add", request.to_wire())
        except (OverflowError, TypeError) as error:
            raise RequestRejected(f"the request does not fit the protocol: {error}", param="prompt") from error
        inbox = self._inboxes[request.request_id] = asyncio.Queue()
        self._send(frame)
        reading = self._read(request.request_id, inbox, is_kept=request.grace_s > 0)
        async with contextlib.aclosing(reading) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _read(
        self, request_id: str, inbox: asyncio.Queue[TokenChunk], *, is_kept: bool
    ) -> AsyncGenerator[TokenChunk, None]:
        """An open request's chunks; leaving early cancels it. Where the gang keeps the answer for the case that we are
        lost, it hears at the end that the answer was taken."""
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
            raise _copy(self._error)
        number = next(self._numbers)
        attaching = self._attaching[number] = _Attaching(asyncio.get_running_loop().create_future())
        self._send(wire.pack_frame("attach", number, request_id))
        try:
            stream_id = await attaching.opened
        except asyncio.CancelledError:
            if attaching.opened.done() and not attaching.opened.cancelled():
                self._leave(attaching.opened.result())
            raise
        finally:
            self._attaching.pop(number, None)
        async with contextlib.aclosing(self._read(stream_id, attaching.inbox, is_kept=True)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return await self._ask_rows("stats", timeout_s)

    async def kv_events(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return await self._ask_rows("kv_events", timeout_s)

    async def _ask_rows(self, name: str, timeout_s: float) -> list[dict[str, Any]]:
        """All that the leader has, frame by frame."""
        rows: list[dict[str, Any]] = []
        while True:
            some: list[dict[str, Any]] = await self._ask(name, timeout_s)
            rows += some
            if len(some) < wire.MAX_RECORDS:
                return rows

    async def _ask(self, name: str, timeout_s: float, *fields: Any) -> Any:
        """A frame that the leader answers with one of the same number."""
        if self._error is not None:
            raise _copy(self._error)
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(wire.pack_frame(name, number, *fields))
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise WorkerLost(f"gang {self.gang_id}: no answer to {name!r} within {timeout_s:g} s") from None
        finally:
            self._asked.pop(number, None)

    def close_when_idle(self) -> None:
        """End once the open requests have. The caller gives this link no more work."""
        self._closes_when_idle = True
        if not self._inboxes:
            self._end(WorkerLost(f"gang {self.gang_id}: retired"))

    async def wait_closed(self) -> None:
        """Until the link has ended, for whatever reason; the caller sets the deadline, if it wants one."""
        await self._closed.wait()

    def close(self) -> None:
        self._end(WorkerLost(f"gang {self.gang_id}: link closed"))

    # ---- the reading task

    async def _run(self, frames: wire.FrameReader) -> None:
        watcher = asyncio.create_task(self._watch_silence(), name=f"link-silence-{self.gang_id}")
        error: TensorweaveError = WorkerLost(f"gang {self.gang_id}: its leader closed the connection")
        try:
            async for frame in frames:
                self._num_silent_beats = 0
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
                        inbox.put_nowait(chunk)
            case ["ping"]:
                pass
            case ["stats" | "kv_events" | "found", number, answer]:
                if (asked := self._asked.get(number)) and not asked.done():
                    asked.set_result(answer)
            case ["attached", number, stream_id, tail]:
                self._begin_attached(number, stream_id, tail)
            case ["kv" | "kv_snapshot", *_]:
                if self.kv.apply(frame):
                    self._send(wire.pack_frame("kv_snapshot"))
            case ["error", fields]:
                self._end(error_from_wire(fields))
            case _:
                raise WireError(f"unexpected {frame[0]!r} frame of {len(frame)} elements")

    def _begin_attached(self, number: int, stream_id: str | None, tail: list[int]) -> None:
        """The chunks that follow this frame belong to the attempt, so its inbox opens here and now."""
        attaching = self._attaching.get(number)
        if attaching is None or attaching.opened.done():
            if stream_id is not None and stream_id not in self._inboxes:
                self.cancel(stream_id)
        elif stream_id is None or stream_id in self._inboxes:
            attaching.opened.set_exception(NotReady(f"gang {self.gang_id}: there is nothing to attach to"))
        else:
            self._inboxes[stream_id] = attaching.inbox
            if tail:
                attaching.inbox.put_nowait(TokenChunk(stream_id, tail))
            attaching.opened.set_result(stream_id)

    async def _watch_silence(self) -> None:
        """Counts beats without news rather than seconds: if our own loop stood still, the leader is not to blame."""
        while self._num_silent_beats * _BEAT_S < SILENCE_LIMIT_S:
            await asyncio.sleep(_BEAT_S)
            self._num_silent_beats += 1
        self._end(WorkerLost(f"gang {self.gang_id}: its leader was silent for {SILENCE_LIMIT_S:g} s"))

    def _send(self, frame: bytes) -> None:
        """A transport that has closed under us raises, before its reader hears of it: the gang is lost either way."""
        try:
            self._writer.write(frame)
        except (RuntimeError, OSError) as error:
            self._end(WorkerLost(f"gang {self.gang_id}: the connection to its leader broke ({error})"))

    def _end(self, error: TensorweaveError) -> None:
        """The first end counts: every open request gets it, and the socket goes."""
        if self._error is not None:
            return
        self._error = error
        for request_id, inbox in self._inboxes.items():
            inbox.put_nowait(TokenChunk(request_id, error=_copy(error)))
        for answer in (*self._asked.values(), *(attaching.opened for attaching in self._attaching.values())):
            if not answer.done():
                answer.set_exception(_copy(error))
        wire.abort(self._writer)
        self._task.cancel()
        self._closed.set()


async def _read_greeting(frames: wire.FrameReader) -> ModelInfo:
    """The leader's hello; an error frame, or an end, says why there is none."""
    async for frame in frames:
        match frame:
            case ["hello", version, fields] if version == PROTOCOL_VERSION:
                return ModelInfo.from_wire(fields)
            case ["error", fields] if isinstance(fields, dict):
                raise error_from_wire(fields)
            case ["hello", version, _]:
                raise WireError(f"the leader speaks protocol {version!r}, here it is {PROTOCOL_VERSION}")
            case _:
                raise WireError(f"{frame[0]!r} frame in place of a hello")
    raise NotReady("the leader closed the connection before its hello")


def _copy(error: TensorweaveError) -> TensorweaveError:
    """One exception object a raise: tracebacks must not pile up on a shared one."""
    return error_from_wire(error.to_wire())
