"""`TcpCarrier`: KV blocks over TCP: for hosts without a faster client between them, and for CPUs.

One connection for each pair of taking and giving rank, opened at the first fetch and kept. The taker opens it and
speaks first; the giver answers.

    taker: hello version secret · transport name · claim no … · close no · probe bytes · alive
    giver: hello version refusal {transport: greeting} · rows no [[index, tag, tokens]…] + digests
           · blocks no [[index, tag]…] + what the transport puts there · end no first_token · fail no kind reason
           · probe + the same · alive

`workers.transfer.stream` has the frames. Each side sends at least one a second; a silence of 3 s, or anything that is
not of this protocol, ends the connection and fails the claims on it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Sequence
from typing import Final

from tensorweave.cluster.limited_log import LimitedLog
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.gang.door import Door, hang_up
from tensorweave.workers.transfer.carrier import Claim, Event, EventQueue, Sink
from tensorweave.workers.transfer.carriers.tcp_client import TcpClientConnection
from tensorweave.workers.transfer.carriers.tcp_server import Entry, TcpServerConnection
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.sending.ticket_table import TicketTable
from tensorweave.workers.transfer.transports.transport import HostTransport, TransportKind
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


class TcpCarrier:
    """Satisfies `Carrier`. Listens on `host` alone, at a port of the system's choice; `secret` opens it.

    `transports`: the ways for payloads, best first; the connection itself where none are given."""

    def __init__(
        self,
        window: PoolWindow,
        fingerprint: dict[str, str],
        host: str,
        secret: str,
        transports: Sequence[TransportKind] | None = None,
    ) -> None:
        assert secret, "an endpoint without a secret is open to everyone"
        self._window = window
        self._secret = secret
        self._transports = (HostTransport(window),) if transports is None else tuple(transports)
        self._table = TicketTable(window, fingerprint)
        self._events = EventQueue()
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, int, str], TcpClientConnection] = {}
        self._servers: list[TcpServerConnection] = []
        self._is_closing = False
        self._log = LimitedLog(logger, logging.INFO)
        self._door = Door(host, "kv-accept", self._admit)
        self.address = self._door.address
        self._door.open()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self._table.offer(ticket_id, offered)

    def fetch(self, endpoint: KvEndpoint, secret: str, claim: Claim, sink: Sink) -> None:
        self._client(endpoint, secret).add(claim, sink)

    def poll(self, timeout_s: float) -> list[Event]:
        return self._events.take(timeout_s)

    def close(self, ticket_id: str) -> None:
        self._table.close(ticket_id)
        for client in list(self._clients.values()):
            client.leave(ticket_id)

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        return self._client(endpoint, secret).probe(num_bytes, timeout_s)

    def shutdown(self) -> None:
        with self._lock:
            self._is_closing = True
            servers, clients = list(self._servers), list(self._clients.values())
        for server in servers:
            server.close()
        for client in clients:
            client.close()
        self._door.close(_JOIN_TIMEOUT_S)
        for server in servers:
            server.join(_JOIN_TIMEOUT_S)
        for client in clients:
            client.join(_JOIN_TIMEOUT_S)

    def _client(self, endpoint: KvEndpoint, secret: str) -> TcpClientConnection:
        """The connection to this endpoint; a new one where there is none or it broke."""
        place = (endpoint.host, endpoint.port)
        with self._lock:
            client = self._clients.get((*place, secret))
            if client is None or client.is_lost:
                client = TcpClientConnection(place, secret, self._window, self._events, self._transports)
                self._clients[*place, secret] = client
                if self._is_closing:
                    client.close()
            return client

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            self._servers = [server for server in self._servers if not server.is_gone]
            if self._is_closing:
                hang_up(sock)
                return
            entry = Entry(sock, self._door, self._secret, self._log)
            self._servers.append(TcpServerConnection(entry, self._table, self._events, self._transports))
