"""`LeaderServer`: front ends connect to rank 0 of a gang, send requests and receive one frame of tokens per step.

An asyncio loop on a thread of its own serves the sockets; a pump thread blocks on the executor's answers and wakes it.
`workers.leader.client_table` handles the frames.

    executor ──await_responses──▶ pump thread ──call_soon_threadsafe──▶ loop thread ──one "step" frame per client──▶
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import threading
from collections.abc import Callable
from typing import Final

from tensorweave.cluster import wire
from tensorweave.cluster.errors import TensorweaveError, WireError, WorkerLost
from tensorweave.cluster.limited_log import LimitedLog
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.tls import accept_tls
from tensorweave.workers.leader.client_table import MAX_UNSENT_BYTES, Client, ClientTable, ServedExecutor

logger = logging.getLogger(__name__)

_PUMP_WAIT_S: Final = 0.25
_START_TIMEOUT_S: Final = 10.0
_MAX_UNAUTHENTICATED: Final = 256


class LeaderServer:
    """Serves an executor on `host`; `start` returns the port. For `max_kv_events` see `ClientTable`."""

    def __init__(
        self,
        executor: ServedExecutor,
        host: str,
        secret: str,
        *,
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
        max_kv_events: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._executor = executor
        self._host = host
        self._secret = secret
        self._tls = tls
        self._max_unsent_bytes = max_unsent_bytes
        self._table = ClientTable(executor, max_kv_events)
        self._unauthenticated: dict[Client, None] = {}
        self._log = LimitedLog(logger, logging.WARNING)
        self._stopping = threading.Event()
        self._is_up = threading.Event()
        self._start_error: OSError | None = None
        self._port = 0
        self._loop: asyncio.AbstractEventLoop
        self._end: asyncio.Event
        self._loop_thread = threading.Thread(target=self._run_loop, name="leader-loop", daemon=True)
        self._pump_thread = threading.Thread(target=self._pump, name="leader-pump", daemon=True)

    # ---- called on any thread

    def start(self) -> int:
        """Listen, and return the port. Raises OSError if the address cannot be bound."""
        self._loop_thread.start()
        if not self._is_up.wait(_START_TIMEOUT_S):
            raise TimeoutError(f"the leader's loop did not start within {_START_TIMEOUT_S} s")
        if self._start_error is not None:
            raise self._start_error
        self._pump_thread.start()
        return self._port

    @property
    def num_open(self) -> int:
        return self._table.requests.num_running

    @property
    def num_kept(self) -> int:
        """Answers that are complete and can be asked for again."""
        return self._table.requests.num_kept

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the open ones. Return whether all have ended within `timeout_s`."""
        self._table.is_draining = True
        return self._table.is_idle.wait(timeout_s)

    def reopen(self) -> None:
        """Take new requests again after `drain`."""
        self._table.is_draining = False

    def stop(self, timeout_s: float = 5.0) -> None:
        """End open requests with `WorkerLost`, close the connections, and end both threads."""
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
                self._call(functools.partial(self._table.publish, chunks, events))
            if executor.failure is not None or not (chunks or executor.is_alive):
                self._call(self._fail_as_executor)
                return

    # ---- the loop thread

    def _run_loop(self) -> None:
        # uvloop loses what arrives before an accepted connection's handshake, and cannot be closed during one.
        new_loop = _new_event_loop if self._tls is None else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=new_loop) as runner:
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
        self._table.requests.close()
        server.close()
        await self._close_clients()

    async def _close_clients(self) -> None:
        """Wait until the last frames are sent, at most a second. Strangers are not waited for."""
        for stranger in self._unauthenticated:
            wire.abort(stranger.writer)
        writers = [client.writer for client in self._table.clients]
        for writer in writers:
            writer.close()
        waits = [asyncio.create_task(_wait_closed(writer)) for writer in writers]
        if waits:
            await asyncio.wait(waits, timeout=1.0)
        for writer in writers:
            wire.abort(writer)  # with TLS, a peer that does not close its end would be waited for

    async def _ping(self) -> None:
        """Clients take a silent leader for a hung one, so an idle one sends pings."""
        while True:
            await asyncio.sleep(wire.PING_INTERVAL_S)
            self._table.ping()

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.tune_socket(writer)
        frames = wire.FrameReader(reader, wire.MAX_HELLO_BYTES)
        client = Client(writer, self._max_unsent_bytes)
        try:
            if not await self._authenticate(client, frames):
                return
            self._table.clients.add(client)
            async for frame in frames:
                self._table.receive(client, frame)
        except WireError as error:
            self._log.write(f"closing a client's connection: {error.message}")
            client.send("error", error.to_wire())
        except Exception:  # the request boundary: a client's malformed frames must not affect another
            logger.exception("closing a client's connection")
        finally:
            self._table.disconnect(client)
            writer.close()

    async def _authenticate(self, client: Client, frames: wire.FrameReader) -> bool:
        """Return False if the client disconnects before its hello. Raises WireError if the hello is late or wrong. If
        too many clients are unauthenticated, the oldest is disconnected."""
        self._unauthenticated[client] = None
        if len(self._unauthenticated) > _MAX_UNAUTHENTICATED:
            oldest = next(iter(self._unauthenticated))
            del self._unauthenticated[oldest]
            wire.abort(oldest.writer)
        try:
            async with asyncio.timeout(wire.HELLO_TIMEOUT_S):
                if self._tls is not None:
                    await accept_tls(client.writer, self._tls)
                first = await anext(frames, None)
        except TimeoutError:
            raise WireError("no hello in time") from None
        finally:
            self._unauthenticated.pop(client, None)
        if first is None:
            return False
        wire.check_hello(first, self._secret)
        frames.decoder.max_frame_bytes = wire.MAX_FRAME_BYTES
        client.send("hello", PROTOCOL_VERSION, self._executor.info.to_wire())
        return True

    def _fail_as_executor(self) -> None:
        self._fail(self._executor.failure or WorkerLost("the gang is shutting down"))

    def _fail(self, error: TensorweaveError) -> None:
        """Send the error to every client, then close the connections."""
        if not self._end.is_set():
            self._table.fail(error)
            self._end.set()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop if it is installed: it takes about a third of the time per wake-up."""
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
