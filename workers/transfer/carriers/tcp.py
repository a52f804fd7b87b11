"""`TcpCarrier`: KV blocks over TCP: for hosts without a faster link between them, and for CPUs.

There is one connection per pair of receiving and sending rank, opened at the first fetch and kept. The receiver opens
it and speaks first.

    receiver: hello version secret · transport name · claim no … (a `ReadRequest`) · close no · probe bytes · alive
    sender:   hello version refusal {transport: handshake} · rows no [[index, generation, tokens]…] + digests
              · blocks no [[index, generation]…] + the transport's body · end no first_token · fail no kind reason
              · probe + the transport's body · alive

`transports.frame_connection` has the frames. Each side sends at least one per second; 3 s of silence, or a violation of
the protocol, ends the connection and fails its reads.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Sequence
from typing import Final

from tensorweave.cluster.limited_log import LimitedLog
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.gang.listener import GuardedListener, close_socket
from tensorweave.workers.transfer.block_sink import BlockSink
from tensorweave.workers.transfer.carrier import Event, EventQueue
from tensorweave.workers.transfer.carriers.tcp_client import TcpClientConnection
from tensorweave.workers.transfer.carriers.tcp_server import Authentication, TcpServerConnection
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.sending.ticket_table import TicketTable
from tensorweave.workers.transfer.transports.host import HostTransport
from tensorweave.workers.transfer.transports.peer_sockets import PeerSockets, PlainPeers
from tensorweave.workers.transfer.transports.transport import Transport
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


class TcpCarrier:
    """Satisfies `Carrier`. Listens on `host` only, at a port that the system chooses; peers must show `secret`.

    `transports` are for payloads, best first; by default the connection itself carries them, over `peers`."""

    def __init__(
        self,
        window: PoolWindow,
        fingerprint: dict[str, str],
        host: str,
        secret: str,
        transports: Sequence[Transport] | None = None,
        peers: PeerSockets | None = None,
    ) -> None:
        assert secret, "an endpoint without a secret is open to everyone"
        self._window = window
        self._peers = PlainPeers() if peers is None else peers
        self._transports = (HostTransport(window),) if transports is None else tuple(transports)
        self._table = TicketTable(window, fingerprint)
        self._events = EventQueue()
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, int, str], TcpClientConnection] = {}
        self._servers: list[TcpServerConnection] = []
        self._is_closing = False
        self._listener = GuardedListener(host, "kv-accept", self._accept)
        self._authentication = Authentication(secret, self._listener, LimitedLog(logger, logging.INFO), self._peers)
        self.address = self._listener.address
        self._listener.start()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self._table.offer(ticket_id, offered)

    def fetch(self, endpoint: KvEndpoint, secret: str, request: ReadRequest, sink: BlockSink) -> None:
        self._connect(endpoint, secret).add(request, sink)

    def poll(self, timeout_s: float) -> list[Event]:
        return self._events.take(timeout_s)

    def close(self, ticket_id: str) -> None:
        self._table.close(ticket_id)
        for client in list(self._clients.values()):
            client.close_reads(ticket_id)

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        return self._connect(endpoint, secret).probe(num_bytes, timeout_s)

    def transport_to(self, endpoint: KvEndpoint, secret: str) -> str:
        return self._connect(endpoint, secret).transport_name

    def shutdown(self) -> None:
        with self._lock:
            self._is_closing = True
            servers, clients = list(self._servers), list(self._clients.values())
        for server in servers:
            server.close()
        for client in clients:
            client.close()
        self._listener.close(_JOIN_TIMEOUT_S)
        for server in servers:
            server.join(_JOIN_TIMEOUT_S)
        for client in clients:
            client.join(_JOIN_TIMEOUT_S)

    def _connect(self, endpoint: KvEndpoint, secret: str) -> TcpClientConnection:
        """The connection to this endpoint; a new one if there is none, or it is lost."""
        address = (endpoint.host, endpoint.port)
        with self._lock:
            client = self._clients.get((*address, secret))
            if client is None or client.is_lost:
                client = TcpClientConnection(address, secret, self._window, self._events, self._transports, self._peers)
                self._clients[*address, secret] = client
                if self._is_closing:
                    client.close()
            return client

    def _accept(self, sock: socket.socket) -> None:
        with self._lock:
            self._servers = [server for server in self._servers if not server.is_closed]
            if self._is_closing:
                close_socket(sock)
                return
            server = TcpServerConnection(sock, self._authentication, self._table, self._events, self._transports)
            self._servers.append(server)
