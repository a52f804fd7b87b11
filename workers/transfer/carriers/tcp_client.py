"""`TcpClientConnection`: the receiving end of a connection of `TcpCarrier`, from its creation until it breaks.

One thread connects and reads incoming blocks into sinks, another sends read requests where the caller cannot; where
the sinks copy blocks themselves, a third waits for the copies.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.wire import Frame
from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink
from tensorweave.workers.transfer.carrier import FAILURE_KINDS, EventQueue, FailureKind, ReadDone, ReadFailed
from tensorweave.workers.transfer.carriers.copy_queue import CopyQueue
from tensorweave.workers.transfer.carriers.tcp_server import MAX_PROBE_BYTES
from tensorweave.workers.transfer.read_request import BlockHeader, ReadRequest
from tensorweave.workers.transfer.transports.frame_connection import ALIVE_INTERVAL_S, SILENCE_S, FrameConnection
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES
from tensorweave.workers.transfer.transports.peer_sockets import PeerSockets
from tensorweave.workers.transfer.transports.transport import ReceivingTransport, Transport
from tensorweave.workers.transfer.window import PoolWindow, tensor_bytes

logger = logging.getLogger(__name__)

_END_WRITER: Final = ("end-writer",)
_COPIES_TIMEOUT_S: Final = 10.0


class TcpClientConnection:
    """Once it `is_lost`, its reads have failed and it accepts no more."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: str,
        window: PoolWindow,
        events: EventQueue,
        transports: Sequence[Transport],
        peers: PeerSockets,
    ) -> None:
        self.is_lost = False
        self._peers = peers
        self.transport_name = ""
        self._failure_kind: FailureKind = "peer_lost"
        self._reason = ""
        self._address = address
        self._secret = secret
        self._transports = transports
        self._events = events
        self._max_body_bytes = max(HOST_MESSAGE_BYTES, window.block_bytes(len(window.heads)), MAX_PROBE_BYTES)
        self._window = window
        self._staging = window.new_staging(0)
        self._staging_bytes = tensor_bytes(self._staging)
        self._lock = threading.Lock()
        self._reads: dict[int, tuple[ReadRequest, BlockSink]] = {}
        self._num_reads = 0
        self._outbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._num_queued = 0
        self._is_open = False
        self._probe_results: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._probing = threading.Lock()
        self._copies = CopyQueue(self._lose)
        self._connection: FrameConnection | None = None
        self._reader = threading.Thread(target=self._read, name="kv-client-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="kv-client-writer", daemon=True)
        self._reader.start()

    def add(self, request: ReadRequest, sink: BlockSink) -> None:
        with self._lock:
            if not self.is_lost:
                self._num_reads += 1
                self._reads[self._num_reads] = (request, sink)
                self._post("claim", self._num_reads, *request.to_wire())
                return
        self._events.put(ReadFailed(request.read_id, self._failure_kind, f"{self._name()} is lost: {self._reason}"))

    def close_reads(self, ticket_id: str) -> None:
        """End the reads under this ticket; blocks that still arrive for them are discarded."""
        with self._lock:
            closed = [number for number, (request, _) in self._reads.items() if request.ticket_id == ticket_id]
            for number in closed:
                del self._reads[number]
                self._post("close", number)

    def probe(self, num_bytes: int, timeout_s: float) -> float:
        with self._probing:
            start_s = time.monotonic()
            with self._lock:
                self._post("probe", num_bytes)
            try:
                has_arrived = not self.is_lost and self._probe_results.get(timeout=max(0.0, timeout_s))
            except queue.Empty:
                has_arrived = False
                self._lose(f"{num_bytes} bytes did not arrive within {timeout_s:g} s")
            if not has_arrived:
                raise TransferFailed(f"{self._name()} is lost: {self._reason}")
            return time.monotonic() - start_s

    def close(self) -> None:
        self._lose("it was closed")

    def join(self, timeout_s: float) -> None:
        for thread in (self._reader, self._writer):
            if thread.ident is not None:
                thread.join(timeout_s)

    def _post(self, *frame: Any) -> None:
        """With the lock held: send the frame, after those before it; by the writer if it would have to wait."""
        if self._is_open and not self._num_queued and self._connection is not None:
            try:
                if self._connection.send_now(*frame):
                    return
            except TransferFailed:
                self._connection.close()  # the reader fails, and the reads with it
                return
        self._num_queued += 1
        self._outbox.put(frame)

    def _name(self) -> str:
        return f"the KV connection to {self._address[0]}:{self._address[1]}"

    # ---- the reader

    def _read(self) -> None:
        reason, transport = "its reader has ended", None
        try:
            self._window.use_own_stream()
            connection, transport = self._open()
            self._writer.start()
            with self._lock:
                self._is_open = True
            transport.open(connection)
            while True:
                self._receive(connection, transport, *connection.receive())
        except (TransferFailed, WireError) as error:
            reason = error.message
        finally:
            self._lose(reason)
            self._copies.close(_COPIES_TIMEOUT_S)  # they read what the transport has mapped
            if transport is not None:
                transport.close()

    def _open(self) -> tuple[FrameConnection, ReceivingTransport]:
        try:
            sock = socket.create_connection(self._address, timeout=SILENCE_S)
        except OSError as error:
            raise TransferFailed(f"cannot connect: {error}") from None
        connection = FrameConnection(sock, self._peers.connected(sock))
        with self._lock:
            self._connection = connection
            if self.is_lost:
                connection.close()
        connection.send("hello", PROTOCOL_VERSION, self._secret)
        frame, _ = connection.receive()
        match frame:
            case ["hello", int(), "", dict(handshakes)]:
                connection.accept_bodies(self._max_body_bytes)
                return connection, self._pick_transport(connection, handshakes)
            case ["hello", int(), str(refusal), *_]:
                raise TransferFailed(f"refused: {refusal}")
            case _:
                raise WireError("the answer to hello must be hello")

    def _pick_transport(self, connection: FrameConnection, handshakes: dict[str, Any]) -> ReceivingTransport:
        """Choose the first of our transports that reaches the sender."""
        for transport in self._transports:
            receiver, handshake = transport.make_receiver(), handshakes.get(transport.name)
            if isinstance(handshake, dict) and receiver.can_reach(handshake):
                logger.info("%s uses the %s transport", self._name(), transport.name)
                self.transport_name = transport.name
                connection.send("transport", transport.name)
                return receiver
        self._failure_kind = "no_transport"
        ours = ", ".join(transport.name for transport in self._transports)
        raise TransferFailed(f"no transport reaches the sender, which has {', '.join(handshakes)}; we have {ours}")

    def _receive(
        self, connection: FrameConnection, transport: ReceivingTransport, frame: Frame, body_bytes: int
    ) -> None:
        if body_bytes > len(self._staging):
            self._staging = self._window.new_staging(body_bytes)
            self._staging_bytes = tensor_bytes(self._staging)
        connection.receive_into(self._staging_bytes[:body_bytes])
        body = self._staging[:body_bytes]
        match frame:
            case ["rows", int(number), list(headers)]:
                _, sink = self._find(number)
                if sink is not None:
                    digests = self._staging_bytes[:body_bytes].tobytes()
                    sink.announce([BlockHeader.from_wire(header) for header in headers], digests)
            case ["blocks", int(number), list(blocks)]:
                payload = transport.receive(body, self._find(number)[0])
                _, sink = self._find(number)  # it may have been closed meanwhile
                if sink is not None:
                    sink.put([_block_from_wire(block) for block in blocks], payload)
            case ["part", int(number), int(first), int(count)] if first >= 0 and count > 0:
                request, sink = self._find(number)
                if request is not None and sink is not None:
                    part_bytes = self._staging_bytes[:body_bytes]
                    part = BlockPart.from_body(range(first, first + count), part_bytes)
                    self._copies.add(transport.pull(part, request, sink))
            case ["end", int(number), int() | None as first_token, list() | None as packed]:
                request, _ = self._find(number)
                if request is not None:
                    extras = None if packed is None else TokenExtras.from_wire(packed)
                    event = ReadDone(request.read_id, first_token, extras)
                    self._copies.then(partial(self._events.put, event))
            case ["fail", int(number), str(kind), str(reason)] if kind in FAILURE_KINDS:
                request, _ = self._find(number)
                if request is not None:
                    failure = ReadFailed(request.read_id, _failure_kind(kind), reason)
                    self._copies.then(partial(self._events.put, failure))
            case ["probe"]:
                transport.receive(body, None)
                self._probe_results.put(True)
            case ["alive"]:
                pass
            case _:
                raise WireError(f"a receiver accepts no {frame[0]!r} frame")

    def _find(self, number: int) -> tuple[ReadRequest, BlockSink] | tuple[None, None]:
        with self._lock:
            return self._reads.get(number, (None, None))

    # ---- the writer, and the end

    def _write(self) -> None:
        connection = self._connection
        assert connection is not None
        try:
            while True:
                try:
                    frame = self._outbox.get(timeout=ALIVE_INTERVAL_S)
                except queue.Empty:
                    connection.send("alive")
                    continue
                if frame is _END_WRITER:
                    return
                connection.send(*frame)
                with self._lock:
                    self._num_queued -= 1
        except TransferFailed:
            connection.close()

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self.is_lost:
                return
            self.is_lost, self._reason = True, reason
            reads, self._reads = self._reads, {}
            connection = self._connection
        self._outbox.put(_END_WRITER)
        self._probe_results.put(False)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()
        logger.info("%s ends: %s", self._name(), reason)
        for request, _ in reads.values():
            self._events.put(ReadFailed(request.read_id, self._failure_kind, f"{self._name()} ends: {reason}"))


def _failure_kind(name: str) -> FailureKind:
    return next(kind for kind in FAILURE_KINDS if kind == name)


def _block_from_wire(fields: Any) -> tuple[int, int]:
    match fields:
        case [int(index), int(generation)]:
            return index, generation
    raise WireError("malformed block")
