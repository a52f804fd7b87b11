"""`LoopCarrier`: ranks of one process exchange blocks through memory, for tests and experiments.

Carriers find each other through a `LoopNetwork`, which each is given: there are no sockets and no globals. A thread per
carrier serves the reads of the others.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.block_sink import BlockSink
from tensorweave.workers.transfer.carrier import Event, EventQueue, ReadDone, ReadFailed, TicketReleased
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlocksReply, PackedCursor, requested_heads
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.sending.read_session import EndReply, ReadSession, RefusalReply, Reply
from tensorweave.workers.transfer.sending.ticket_table import TicketTable
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES, PoolLoader
from tensorweave.workers.transfer.window import PoolWindow

_IDLE_WAIT_S = 1.0
_JOIN_TIMEOUT_S = 10.0


class LoopNetwork:
    """The carriers that can reach each other, by a number that takes the place of a port."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._carriers: dict[int, LoopCarrier] = {}
        self._num_joined = 0

    def join(self, carrier: LoopCarrier) -> int:
        with self._lock:
            self._num_joined += 1
            self._carriers[self._num_joined] = carrier
            return self._num_joined

    def leave(self, number: int) -> None:
        with self._lock:
            self._carriers.pop(number, None)

    def find(self, number: int) -> LoopCarrier | None:
        return self._carriers.get(number)


@dataclass(frozen=True, slots=True, eq=False)
class _OpenRead:
    """A read of another carrier that is served here."""

    session: ReadSession
    sink: BlockSink
    receiver: LoopCarrier


class LoopCarrier:
    """Satisfies `Carrier`."""

    def __init__(self, window: PoolWindow, fingerprint: dict[str, str], secret: str, network: LoopNetwork) -> None:
        self._table = TicketTable(window, fingerprint)
        self._secret = secret
        self._network = network
        self._events = EventQueue()
        self._lock = threading.Lock()
        self._reads: list[_OpenRead] = []
        self._senders: dict[str, list[LoopCarrier]] = {}
        self._is_closing = False
        self.address = ("loop", network.join(self))
        self._thread = threading.Thread(target=self._serve, name="loop-carrier", daemon=True)
        self._thread.start()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self._table.offer(ticket_id, offered)

    def fetch(self, endpoint: KvEndpoint, secret: str, request: ReadRequest, sink: BlockSink) -> None:
        sender = self._network.find(endpoint.port)
        if sender is None or not sender.accept_read(secret, request, sink, self):
            reason = f"no carrier at {endpoint.host}:{endpoint.port}"
            self.put_event(ReadFailed(request.read_id, "peer_lost", reason))
        else:
            self._senders.setdefault(request.ticket_id, []).append(sender)

    def poll(self, timeout_s: float) -> list[Event]:
        return self._events.take(timeout_s)

    def close(self, ticket_id: str) -> None:
        self._table.close(ticket_id)
        for sender in self._senders.pop(ticket_id, []):
            sender.end_reads(ticket_id, self)

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        if self._network.find(endpoint.port) is None:
            raise TransferFailed(f"no carrier at {endpoint.host}:{endpoint.port}")
        start_s = time.monotonic()
        bytearray(bytes(num_bytes))
        return time.monotonic() - start_s

    def transport_to(self, endpoint: KvEndpoint, secret: str) -> str:
        return "memory"

    def shutdown(self) -> None:
        self._network.leave(self.address[1])
        with self._lock:
            self._is_closing = True
            reads, self._reads = self._reads, []
        self._table.notify()
        for read in reads:
            failure = ReadFailed(read.session.request.read_id, "peer_lost", "the carrier was shut down")
            read.receiver.put_event(failure)
        for ticket_id in list(self._senders):
            self.close(ticket_id)
        self._thread.join(_JOIN_TIMEOUT_S)

    # ---- called by other carriers

    def accept_read(self, secret: str, request: ReadRequest, sink: BlockSink, receiver: LoopCarrier) -> bool:
        """Return False if the secret is wrong, or this carrier was shut down."""
        window = self._table.window
        heads, loader = requested_heads(request, window), PoolLoader(window, HOST_MESSAGE_BYTES)
        with self._lock:
            if self._is_closing or secret != self._secret:
                return False
            self._reads.append(
                _OpenRead(ReadSession(self._table, request, PackedCursor(request, heads, loader)), sink, receiver)
            )
        self._table.notify()
        return True

    def end_reads(self, ticket_id: str, receiver: LoopCarrier) -> None:
        with self._lock:
            ended = [r for r in self._reads if r.receiver is receiver and r.session.request.ticket_id == ticket_id]
            self._reads = [read for read in self._reads if read not in ended]
        if any(read.session.request.ends_lease for read in ended):
            self.put_event(TicketReleased(ticket_id))

    def put_event(self, event: Event) -> None:
        self._events.put(event)

    # ---- the thread

    def _serve(self) -> None:
        while not self._is_closing:
            version = self._table.version
            num_sent = sum(self._serve_read(read) for read in list(self._reads))
            if not num_sent:
                self._table.wait(version, _IDLE_WAIT_S)

    def _serve_read(self, read: _OpenRead) -> bool:
        """Send what can be sent now; return whether there was anything."""
        if read.session.is_over:
            return False
        reply = read.session.next_reply(self._table.window.new_staging(read.session.message_bytes))
        if reply is None:
            return False
        _deliver(read, reply)
        return True


def _deliver(read: _OpenRead, reply: Reply) -> None:
    read_id = read.session.request.read_id
    if isinstance(reply, BlocksReply):
        read.sink.announce(reply.headers, reply.digests)
        read.sink.put([(header.index, header.generation) for header in reply.headers], reply.payload)
    elif isinstance(reply, EndReply):
        read.receiver.put_event(ReadDone(read_id, reply.first_token, reply.extras))
    elif isinstance(reply, RefusalReply):
        read.receiver.put_event(ReadFailed(read_id, reply.kind, reply.reason))
