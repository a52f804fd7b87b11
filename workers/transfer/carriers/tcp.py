"""`TcpCarrier`: KV blocks over TCP: for hosts without a faster road between them, and for CPUs.

One connection for each pair of taking and giving rank, opened at the first fetch and kept. The taker opens it and
speaks first; the giver answers.

    taker: hello version secret · lane name · claim no … · close no · probe bytes · alive
    giver: hello version refusal {lane: greeting} · rows no [[index, tag, tokens]…] + digests
           · blocks no [[index, tag]…] + what the lane puts there · end no first_token · fail no kind reason
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
from tensorweave.workers.transfer.carriers.carrier import Claim, Event, EventQueue, Sink
from tensorweave.workers.transfer.carriers.tcp_giver import Entry, Visitor
from tensorweave.workers.transfer.carriers.tcp_taker import Road
from tensorweave.workers.transfer.giving.desk import Desk
from tensorweave.workers.transfer.giving.shelf import Shelf
from tensorweave.workers.transfer.lanes.lane import HostLane, LaneKind
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


class TcpCarrier:
    """Satisfies `Carrier`. Listens on `host` alone, at a port of the system's choice; `secret` opens it.

    `lanes`: the ways for payloads, best first; the connection itself where none are given."""

    def __init__(
        self,
        window: PoolWindow,
        fingerprint: dict[str, str],
        host: str,
        secret: str,
        lanes: Sequence[LaneKind] | None = None,
    ) -> None:
        assert secret, "an endpoint without a secret is open to everyone"
        self._window = window
        self._secret = secret
        self._lanes = (HostLane(window),) if lanes is None else tuple(lanes)
        self._desk = Desk(window, fingerprint)
        self._events = EventQueue()
        self._lock = threading.Lock()
        self._roads: dict[tuple[str, int, str], Road] = {}
        self._visitors: list[Visitor] = []
        self._is_closing = False
        self._log = LimitedLog(logger, logging.INFO)
        self._door = Door(host, "kv-accept", self._admit)
        self.address = self._door.address
        self._door.open()

    def offer(self, ticket_id: str, shelf: Shelf) -> None:
        self._desk.offer(ticket_id, shelf)

    def fetch(self, endpoint: KvEndpoint, secret: str, claim: Claim, sink: Sink) -> None:
        self._road(endpoint, secret).add(claim, sink)

    def poll(self, timeout_s: float) -> list[Event]:
        return self._events.take(timeout_s)

    def close(self, ticket_id: str) -> None:
        self._desk.close(ticket_id)
        for road in list(self._roads.values()):
            road.leave(ticket_id)

    def probe(self, endpoint: KvEndpoint, secret: str, num_bytes: int, timeout_s: float) -> float:
        return self._road(endpoint, secret).probe(num_bytes, timeout_s)

    def shutdown(self) -> None:
        with self._lock:
            self._is_closing = True
            visitors, roads = list(self._visitors), list(self._roads.values())
        for visitor in visitors:
            visitor.close()
        for road in roads:
            road.close()
        self._door.close(_JOIN_TIMEOUT_S)
        for visitor in visitors:
            visitor.join(_JOIN_TIMEOUT_S)
        for road in roads:
            road.join(_JOIN_TIMEOUT_S)

    def _road(self, endpoint: KvEndpoint, secret: str) -> Road:
        """The connection to this endpoint; a new one where there is none or it broke."""
        place = (endpoint.host, endpoint.port)
        with self._lock:
            road = self._roads.get((*place, secret))
            if road is None or road.is_lost:
                road = Road(place, secret, self._window, self._events, self._lanes)
                self._roads[*place, secret] = road
                if self._is_closing:
                    road.close()
            return road

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            self._visitors = [visitor for visitor in self._visitors if not visitor.is_gone]
            if self._is_closing:
                hang_up(sock)
                return
            entry = Entry(sock, self._door, self._secret, self._log)
            self._visitors.append(Visitor(entry, self._desk, self._events, self._lanes))
