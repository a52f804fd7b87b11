"""`LoopCarrier`: ranks of one process exchange blocks through memory, for tests and for trying things out.

Carriers find each other through an `Exchange` that they are given: no sockets, no globals. A thread serves the claims
on each carrier.
"""

from __future__ import annotations

import threading
import time

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.carrier import Claim, Ended, Event, EventQueue, Failed, Sink, TicketOver
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.sending.ticket_table import Blocks, End, Message, Serving, TicketTable
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES, PoolLoader
from tensorweave.workers.transfer.window import PoolWindow

_IDLE_WAIT_S = 1.0
_JOIN_TIMEOUT_S = 10.0


class Exchange:
    """The carriers that can reach each other; their number there stands in for a port."""

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


class _ServedConnection:
    """A claim of another carrier, being served here."""

    def __init__(self, serving: Serving, sink: Sink, taker: LoopCarrier) -> None:
        self.serving = serving
        self.sink = sink
        self.taker = taker


class LoopCarrier:
    """Satisfies `Carrier`."""

    def __init__(self, window: PoolWindow, fingerprint: dict[str, str], secret: str, exchange: Exchange) -> None:
        self._table = TicketTable(window, fingerprint)
        self._secret = secret
        self._exchange = exchange
        self._events = EventQueue()
        self._lock = threading.Lock()
        self._connections: list[_ServedConnection] = []
        self._hosts: dict[str, list[LoopCarrier]] = {}
        self._is_closing = False
        self.address = ("loop", exchange.join(self))
        self._thread = threading.Thread(target=self._serve, name="loop-carrier", daemon=True)
        self._thread.start()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self._table.offer(ticket_id, offered)

    def fetch(self, endpoint: KvEndpoint, secret: str, claim: Claim, sink: Sink) -> None:
        host = self._exchange.find(endpoint.port)
        if host is None or not host.admit(secret, claim, sink, self):
            self.tell(Failed(claim.claim_id, "peer_lost", f"no carrier at {endpoint.host}:{endpoint.port}"))
        else:
            self._hosts.setdefault(claim.ticket_id, []).append(host)

    def poll(self, timeout_s: float) -> list[Event]:
        return self._events.take(timeout_s)

    def close(self, ticket_id: str) -> None:
        self._table.close(ticket_id)
        for host in self._hosts.pop(ticket_id, []):
            host.dismiss(ticket_id, self)

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        if self._exchange.find(endpoint.port) is None:
            raise TransferFailed(f"no carrier at {endpoint.host}:{endpoint.port}")
        start_s = time.monotonic()
        bytearray(bytes(num_bytes))
        return time.monotonic() - start_s

    def shutdown(self) -> None:
        self._exchange.leave(self.address[1])
        with self._lock:
            self._is_closing = True
            connections, self._connections = self._connections, []
        self._table.poke()
        for connection in connections:
            connection.taker.tell(Failed(connection.serving.claim.claim_id, "peer_lost", "the carrier was shut down"))
        for ticket_id in list(self._hosts):
            self.close(ticket_id)
        self._thread.join(_JOIN_TIMEOUT_S)

    # ---- between carriers

    def admit(self, secret: str, claim: Claim, sink: Sink, taker: LoopCarrier) -> bool:
        with self._lock:
            if self._is_closing or secret != self._secret:
                return False
            self._connections.append(
                _ServedConnection(
                    Serving(self._table, claim, PoolLoader(self._table.window, HOST_MESSAGE_BYTES)), sink, taker
                )
            )
        self._table.poke()
        return True

    def dismiss(self, ticket_id: str, taker: LoopCarrier) -> None:
        with self._lock:
            leaving = [v for v in self._connections if v.taker is taker and v.serving.claim.ticket_id == ticket_id]
            self._connections = [connection for connection in self._connections if connection not in leaving]
        if any(connection.serving.claim.ends_lease for connection in leaving):
            self.tell(TicketOver(ticket_id))

    def tell(self, event: Event) -> None:
        self._events.put(event)

    # ---- the thread

    def _serve(self) -> None:
        while not self._is_closing:
            version = self._table.version
            num_sent = sum(self._serve_one(connection) for connection in list(self._connections))
            if not num_sent:
                self._table.wait(version, _IDLE_WAIT_S)

    def _serve_one(self, connection: _ServedConnection) -> bool:
        """Whether there was something to send."""
        if connection.serving.is_over:
            return False
        message: Message | None = connection.serving.next(
            self._table.window.new_staging(connection.serving.message_bytes)
        )
        if message is None:
            return False
        _deliver(connection, message)
        return True


def _deliver(connection: _ServedConnection, message: Message) -> None:
    claim_id = connection.serving.claim.claim_id
    if isinstance(message, Blocks):
        connection.sink.announce(message.rows, message.digests)
        connection.sink.put([(row.index, row.tag) for row in message.rows], message.payload)
    elif isinstance(message, End):
        connection.taker.tell(Ended(claim_id, message.first_token, message.extras))
    else:
        connection.taker.tell(Failed(claim_id, message.kind, message.reason))
