"""`TcpServerConnection`: the sending end of a connection of `TcpCarrier`. A thread reads requests, one sends blocks.

What needs no staging memory (where blocks lie, a first token) is sent at once by the thread that has read the request,
if it is there already: each change of threads costs as much as copying some 20 MB over NVLink.
"""

from __future__ import annotations

import hmac
import logging
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.cluster.limited_log import LimitedLog
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.wire import Frame
from tensorweave.workers.gang.listener import GuardedListener
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.carrier import EventQueue, TicketReleased
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlocksReply
from tensorweave.workers.transfer.sending.read_session import EndReply, ReadSession, Reply
from tensorweave.workers.transfer.sending.ticket_table import TicketTable
from tensorweave.workers.transfer.transports.frame_connection import ALIVE_INTERVAL_S, FrameConnection
from tensorweave.workers.transfer.transports.peer_sockets import PeerSockets
from tensorweave.workers.transfer.transports.transport import SendingTransport, Transport

logger = logging.getLogger(__name__)

MAX_PROBE_BYTES: Final = 256 << 20
_NO_STAGING: Final = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Authentication:
    """What the peers of a listener must show. `log` takes the failures, which strangers can cause at will."""

    secret: str
    listener: GuardedListener
    log: LimitedLog
    peers: PeerSockets

    def accepts(self, secret: str) -> bool:
        return hmac.compare_digest(secret.encode(), self.secret.encode())


class TcpServerConnection:
    def __init__(
        self,
        sock: socket.socket,
        authentication: Authentication,
        table: TicketTable,
        events: EventQueue,
        transports: Sequence[Transport],
    ) -> None:
        self.is_closed = False
        self._sock = sock
        self._authentication = authentication
        self._connection = FrameConnection(sock, authentication.peers.accepted(sock))
        self._table = table
        self._events = events
        self._sessions: dict[int, ReadSession] = {}
        self._transports = {transport.name: transport.make_sender() for transport in transports}
        self._transport: SendingTransport | None = None
        self._serving = threading.Lock()
        self._probes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="kv-server-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="kv-server-writer", daemon=True)
        self._reader.start()

    def close(self) -> None:
        self.is_closed = True
        self._connection.close()
        self._table.notify()

    def join(self, timeout_s: float) -> None:
        for thread in (self._reader, self._writer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout_s)

    # ---- the reader

    def _read(self) -> None:
        try:
            self._table.window.use_own_stream()
            self._transport = self._open()
            self._writer.start()
            while True:
                self._receive(*self._connection.receive())
        except (TransferFailed, WireError) as error:
            if self._transport is None:
                self._authentication.log.write(f"a connection to the KV endpoint ends during its handshake: {error}")
            elif not self.is_closed:
                logger.info("the connection of a KV receiver ends: %s", error)
        finally:
            self._authentication.listener.trust(self._sock)
            self.close()
            for session in self._sessions.values():
                self._end_session(session)

    def _open(self) -> SendingTransport:
        frame, body_bytes = self._connection.receive()
        match frame:
            case ["hello", int(version), str(secret)] if not body_bytes:
                pass
            case _:
                raise WireError("the first frame must be hello")
        refusal = ""
        if version != PROTOCOL_VERSION:
            refusal = f"protocol version {version}, here it is {PROTOCOL_VERSION}"
        elif not self._authentication.accepts(secret):
            refusal = "wrong secret"
        handshakes = {} if refusal else {name: sender.handshake() for name, sender in self._transports.items()}
        self._connection.send("hello", PROTOCOL_VERSION, refusal, handshakes)
        if refusal:
            raise WireError(refusal)
        self._authentication.listener.trust(self._sock)
        self._connection.accept_bodies(0)
        frame, _ = self._connection.receive()
        match frame:
            case ["transport", str(name)] if name in self._transports:
                return self._transports[name]
        raise WireError("the second frame must name a transport")

    def _receive(self, frame: Frame, body_bytes: int) -> None:
        match frame:
            case ["claim", int(number), *fields]:
                assert self._transport is not None
                request = ReadRequest.from_wire(fields)
                session = ReadSession(self._table, request, self._transport.cursor(request))
                with self._serving:
                    self._sessions = {**self._sessions, number: session}  # the writer iterates over the old one
                    if not session.message_bytes:
                        self._serve(self._transport, number, session)
                self._table.notify()
            case ["close", int(number)]:
                sessions = dict(self._sessions)
                closed = sessions.pop(number, None)
                self._sessions = sessions
                if closed is not None:
                    self._end_session(closed)
            case ["probe", int(num_bytes)] if 0 <= num_bytes <= MAX_PROBE_BYTES:
                self._probes.put(num_bytes)
                self._table.notify()
            case ["alive"]:
                pass
            case _:
                raise WireError(f"a sender accepts no {frame[0]!r} frame")

    def _end_session(self, session: ReadSession) -> None:
        if session.request.ends_lease:
            self._events.put(TicketReleased(session.request.ticket_id))

    # ---- the writer

    def _write(self) -> None:
        transport = self._transport
        assert transport is not None
        try:
            self._table.window.use_own_stream()
            transport.open(self._connection)
            sent_s = time.monotonic()
            while not self.is_closed:
                version = self._table.version
                while not self._probes.empty():
                    transport.probe(self._probes.get())
                with self._serving:
                    num_sent = sum(self._serve(transport, *item) for item in self._sessions.items())
                if num_sent:
                    sent_s = time.monotonic()
                    continue
                self._table.wait(version, sent_s + ALIVE_INTERVAL_S - time.monotonic())
                if time.monotonic() >= sent_s + ALIVE_INTERVAL_S:
                    self._connection.send("alive")
                    sent_s = time.monotonic()
        except TransferFailed as error:
            logger.info("a KV sender's connection ends: %s", error)  # the reader fails too
        finally:
            self._connection.close()
            transport.close()

    def _serve(self, transport: SendingTransport, number: int, session: ReadSession) -> bool:
        """Send what can be sent now; return whether there was anything."""
        if session.is_over:
            return False
        staging = transport.staging(session.message_bytes) if session.message_bytes else _NO_STAGING
        reply = session.next_reply(staging)
        if reply is None:
            return False
        while isinstance(reply, BlockPart):  # it is sent with what follows it, if that is there
            after = session.next_reply(staging)
            layers, is_held = reply.layers, after is not None
            self._connection.send("part", number, layers.start, len(layers), body=reply.body(), is_held=is_held)
            reply = after
        if reply is not None:
            self._send(transport, number, reply)
        return True

    def _send(self, transport: SendingTransport, number: int, reply: Reply) -> None:
        assert not isinstance(reply, BlockPart)
        if isinstance(reply, BlocksReply):
            headers = [header.to_wire() for header in reply.headers]
            self._connection.send("rows", number, headers, body=reply.digests, is_held=True)
            transport.send(reply.payload, "blocks", number, [header[:2] for header in headers])
        elif isinstance(reply, EndReply):
            extras = None if reply.extras is None else reply.extras.to_wire()
            self._connection.send("end", number, reply.first_token, extras)
        else:
            self._connection.send("fail", number, reply.kind, reply.reason)
