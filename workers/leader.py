"""The leader's socket: front ends connect to rank 0 of a gang, hand in requests and get one frame of tokens a step.

An asyncio loop on a thread of its own serves the sockets; a pump thread blocks on the executor's answers and wakes it.
A client that ends has its requests cancelled (after their grace, if they have one); one that does not read is cut off;
neither harms the others. Clients that follow the KV cache hear of its changes.

    executor ──await_responses──▶ pump thread ──call_soon_threadsafe──▶ loop thread ──one "step" frame a client──▶
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from tensorweave.cluster import wire
from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError, WireError, WorkerLost
from tensorweave.cluster.protocol import PROTOCOL_VERSION, GenerateRequest, ModelInfo, TokenChunk
from tensorweave.workers.kv_journal import KvJournal
from tensorweave.workers.streams import Streams

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES: Final = 8 << 20
"""A client that lets this much pile up, beside logits and log-probabilities that it asked for, is cut off."""
MAX_STEP_BYTES: Final = 4 << 20
"""Of logits and log-probabilities in one frame, but for the last chunk's."""
_PUMP_WAIT_S: Final = 0.25
_START_TIMEOUT_S: Final = 10.0


class ServedExecutor(Protocol):
    """What the leader needs of an executor: `PyExecutor`, or the fake of the tests."""

    info: ModelInfo
    failure: TensorweaveError | None

    @property
    def is_alive(self) -> bool: ...

    def enqueue_request(self, request: GenerateRequest) -> str: ...

    def cancel_request(self, request_id: str) -> bool: ...

    def await_responses(self, request_ids: None = None, timeout_s: float | None = None) -> Sequence[TokenChunk]: ...

    def get_latest_iteration_stats(self) -> list[dict[str, Any]]: ...

    def get_latest_kv_cache_events(self) -> list[dict[str, Any]]: ...


class _Client:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter, max_unsent_bytes: int) -> None:
        self.writer = writer
        self.follows_kv = False
        self._max_unsent_bytes = max_unsent_bytes
        self._num_asked_bytes = 0

    def send(self, name: str, *fields: Any) -> None:
        if self.writer.is_closing():
            return
        self.writer.write(wire.pack_frame(name, *fields))
        if wire.unsent_bytes(self.writer) > self._max_unsent_bytes + self._num_asked_bytes:
            logger.warning("a client does not read its answers: cut off")
            wire.abort(self.writer)

    def answer(self, chunks: Sequence[TokenChunk]) -> None:
        """One frame, or several where much is told beside the tokens: that may pile up, since it was asked for."""
        if not wire.unsent_bytes(self.writer):
            self._num_asked_bytes = 0
        frame: list[Any] = []
        num_bytes = 0
        for chunk in chunks:
            frame.append(chunk.to_wire())
            num_bytes += chunk.num_extra_bytes
            if num_bytes >= MAX_STEP_BYTES:
                self._num_asked_bytes += num_bytes
                self.send("step", frame)
                frame, num_bytes = [], 0
        if frame:
            self._num_asked_bytes += num_bytes
            self.send("step", frame)


class LeaderServer:
    """Serves an executor on `host`; `start` returns the port. All state is the loop thread's."""

    def __init__(
        self, executor: ServedExecutor, host: str, secret: str, *, max_unsent_bytes: int = MAX_UNSENT_BYTES
    ) -> None:
        self._executor = executor
        self._host = host
        self._secret = secret
        self._max_unsent_bytes = max_unsent_bytes
        self._streams: Streams[_Client] = Streams(executor.cancel_request)
        self._journal = KvJournal()
        self._clients: set[_Client] = set()
        self._is_draining = False
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._stopping = threading.Event()
        self._is_up = threading.Event()
        self._start_error: OSError | None = None
        self._port = 0
        self._loop: asyncio.AbstractEventLoop
        self._end: asyncio.Event
        self._loop_thread = threading.Thread(target=self._run_loop, name="leader-loop", daemon=True)
        self._pump_thread = threading.Thread(target=self._pump, name="leader-pump", daemon=True)

    # ---- called from any thread

    def start(self) -> int:
        """Listen; returns the port. Raises OSError when the address cannot be bound."""
        self._loop_thread.start()
        if not self._is_up.wait(_START_TIMEOUT_S):
            raise TimeoutError(f"the leader's loop did not start within {_START_TIMEOUT_S} s")
        if self._start_error is not None:
            raise self._start_error
        self._pump_thread.start()
        return self._port

    @property
    def num_open(self) -> int:
        return len(self._streams)

    @property
    def num_kept(self) -> int:
        """Answers that are over and may be asked for again."""
        return self._streams.num_kept

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the open ones; True when none is left."""
        self._is_draining = True
        return self._is_idle.wait(timeout_s)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Open requests get `WorkerLost`, connections close, both threads end."""
        self._stopping.set()
        if self._loop_thread.ident is None:
            return
        self._call(lambda: self._fail(WorkerLost("the gang is shutting down")))
        self._loop_thread.join(timeout_s)
        if self._pump_thread.ident is not None:
            self._pump_thread.join(timeout_s)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            assert self._loop.is_closed()

    # ---- the pump thread

    def _pump(self) -> None:
        executor = self._executor
        while not self._stopping.is_set():
            chunks = executor.await_responses(timeout_s=_PUMP_WAIT_S)
            events = executor.get_latest_kv_cache_events()
            if chunks or events:
                self._call(functools.partial(self._pass_on, chunks, events))
            if executor.failure is not None or not (chunks or executor.is_alive):
                self._call(self._fail_as_executor)
                return

    # ---- the loop thread

    def _run_loop(self) -> None:
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            self._loop = runner.get_loop()
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        try:
            server = await asyncio.start_server(self._serve_client, self._host, 0)
        except OSError as error:
            self._start_error = error
            self._is_up.set()
            return
        self._port = server.sockets[0].getsockname()[1]
        pings = asyncio.create_task(self._ping())
        self._is_up.set()
        await self._end.wait()
        pings.cancel()
        self._streams.close()
        server.close()
        await self._close_clients()

    async def _close_clients(self) -> None:
        """Let the last frames out, for a second at most."""
        for client in self._clients:
            client.writer.close()
        waits = [asyncio.create_task(_wait_closed(client.writer)) for client in self._clients]
        if waits:
            await asyncio.wait(waits, timeout=1.0)

    async def _ping(self) -> None:
        """A silent leader is a hung one, so an idle one speaks."""
        while True:
            await asyncio.sleep(wire.PING_INTERVAL_S)
            for client in tuple(self._clients):
                client.send("ping")

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.tune_socket(writer)
        frames = wire.FrameReader(reader, wire.MAX_HELLO_BYTES)
        client = _Client(writer, self._max_unsent_bytes)
        try:
            if not await self._greet(client, frames):
                return
            self._clients.add(client)
            async for frame in frames:
                self._receive(client, frame)
        except WireError as error:
            logger.warning("closing a client's connection: %s", error.message)
            client.send("error", error.to_wire())
        except Exception:  # the request boundary: one client's nonsense must not reach another
            logger.exception("closing a client's connection")
        finally:
            self._clients.discard(client)
            self._streams.lose(client)
            writer.close()

    async def _greet(self, client: _Client, frames: wire.FrameReader) -> bool:
        try:
            async with asyncio.timeout(wire.HELLO_TIMEOUT_S):
                first = await anext(frames, None)
        except TimeoutError:
            raise WireError("no hello in time") from None
        if first is None:
            return False
        wire.check_hello(first, self._secret)
        frames.decoder.max_frame_bytes = wire.MAX_FRAME_BYTES
        client.send("hello", PROTOCOL_VERSION, self._executor.info.to_wire())
        return True

    def _receive(self, client: _Client, frame: wire.Frame) -> None:
        match frame:
            case ["add", fields]:
                self._add(client, GenerateRequest.from_wire(fields))
            case ["cancel", str(request_id)]:
                if not self._streams.cancel(request_id, client):
                    self._executor.cancel_request(request_id)  # it has ended; what it still offers goes
            case ["find", int(number), str(request_id)]:
                client.send("found", number, self._streams.find(request_id) is not None)
            case ["attach", int(number), str(request_id)]:
                self._attach(client, number, request_id)
            case ["stats", int(number)]:
                client.send("stats", number, self._executor.get_latest_iteration_stats())
            case ["kv_subscribe"]:
                client.follows_kv = True
                client.send("kv_snapshot", *self._journal.snapshot())
            case ["kv_snapshot"]:
                client.send("kv_snapshot", *self._journal.snapshot())
            case _:
                raise WireError(f"unexpected {frame[0]!r} frame of {len(frame)} elements")

    def _add(self, client: _Client, request: GenerateRequest) -> None:
        request_id = request.request_id
        if self._streams.runs(request_id):
            error: TensorweaveError = RequestRejected(f"request id {request_id!r} is in use", param="request_id")
            client.answer([TokenChunk(request_id, error=error)])
            return
        self._streams.open(request, client)
        self._is_idle.clear()
        try:
            if self._is_draining:
                raise NotReady("the gang is draining", retry_after_s=1.0)
            self._executor.enqueue_request(request)
        except TensorweaveError as refusal:
            self._deliver([TokenChunk(request_id, error=refusal)])
        except (ValueError, TypeError, OverflowError) as problem:
            self._deliver([TokenChunk(request_id, error=RequestRejected(str(problem)))])

    def _attach(self, client: _Client, number: int, request_id: str) -> None:
        """All that the answer has so far, then what comes. An attempt that began where another one broke off was given
        the answer's beginning with its prompt."""
        stream = self._streams.find(request_id)
        if stream is None:
            client.send("attached", number, None, [])
            return
        client.send("attached", number, stream.request_id, stream.replayed)
        if stream.chunks:
            client.answer(stream.chunks)
        self._streams.attach(stream, client)

    def _pass_on(self, chunks: Sequence[TokenChunk], events: Sequence[dict[str, Any]]) -> None:
        """What one wake-up of the pump brought."""
        if (news := self._journal.add(events)) is not None:
            for client in self._clients:
                if client.follows_kv:
                    client.send("kv", *news)
        self._deliver(chunks)

    def _deliver(self, chunks: Sequence[TokenChunk]) -> None:
        """One frame a client. A request whose clients have gone is forgotten once its last chunk came."""
        by_client: dict[_Client, list[TokenChunk]] = {}
        for chunk in chunks:
            for client in self._streams.note(chunk):
                by_client.setdefault(client, []).append(chunk)
        for client, mine in by_client.items():
            client.answer(mine)
        if not self._streams:
            self._is_idle.set()

    def _fail_as_executor(self) -> None:
        self._fail(self._executor.failure or WorkerLost("the gang is shutting down"))

    def _fail(self, error: TensorweaveError) -> None:
        """The executor is no more: everyone hears why, then the connections close."""
        if self._end.is_set():
            return
        self._deliver([TokenChunk(request_id, error=error) for request_id in self._streams.running_ids])
        for client in self._clients:
            client.send("error", error.to_wire())
        self._end.set()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed: about a third of the time per wake-up."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _wait_closed(writer: asyncio.StreamWriter) -> None:
    try:
        await writer.wait_closed()
    except OSError as error:
        logger.debug("a connection broke while closing: %s", error)
