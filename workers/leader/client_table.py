"""`ClientTable`: the front ends connected to a gang's leader, their frames and the answers to them.

Used on the loop thread only; `workers.leader.server` has the sockets and the threads. If a client disconnects, its
requests are cancelled (after their grace, if they have one); a client that does not read is disconnected; neither
affects the others. Clients that subscribe to the KV cache receive its changes.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

from tensorweave.cluster import wire
from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError, WireError
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, TokenChunk
from tensorweave.workers.leader.kv_journal import KvChanges, KvJournal
from tensorweave.workers.leader.request_table import RequestTable

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES: Final = 8 << 20
"""A client that leaves this much unread, beside logits and log-probabilities that it asked for, is disconnected."""
DISCONNECT_WAIT_S: Final = 0.02
"""A router may ask for a request of a killed router just before the connections of the killed one break."""
MAX_STEP_BYTES: Final = 4 << 20
"""Logits and log-probabilities in one frame; the last chunk of a frame may exceed it."""

Records = collections.deque[dict[str, Any]]
"""Statistics of steps, or KV events."""


class ServedExecutor(Protocol):
    """What the leader needs of an executor: `PyExecutor`, or `FakeExecutor`."""

    info: ModelInfo
    failure: TensorweaveError | None

    @property
    def is_alive(self) -> bool: ...

    def enqueue_request(self, request: GenerateRequest) -> str: ...

    def cancel_request(self, request_id: str) -> bool: ...

    def await_responses(self, request_ids: None = None, timeout_s: float | None = None) -> Sequence[TokenChunk]: ...

    def get_latest_iteration_stats(self) -> list[dict[str, Any]]: ...

    def get_latest_kv_cache_events(self) -> list[dict[str, Any]]: ...


class Client:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter, max_unsent_bytes: int) -> None:
        self.writer = writer
        self.is_kv_subscriber = False
        self._max_unsent_bytes = max_unsent_bytes
        self._num_extra_bytes = 0

    def send(self, name: str, *fields: Any) -> None:
        if self.writer.is_closing():
            return
        self.writer.write(wire.pack_frame(name, *fields))
        if wire.unsent_bytes(self.writer) > self._max_unsent_bytes + self._num_extra_bytes:
            logger.warning("disconnecting a client that does not read its answers")
            wire.abort(self.writer)

    def send_chunks(self, chunks: Sequence[TokenChunk]) -> None:
        """Send chunks in one frame, or in several if they carry many log-probabilities or logits. Those may stay
        unread, since the client asked for them."""
        if not wire.unsent_bytes(self.writer):
            self._num_extra_bytes = 0
        frame: list[Any] = []
        num_bytes = 0
        for chunk in chunks:
            frame.append(chunk.to_wire())
            num_bytes += chunk.num_extra_bytes
            if num_bytes >= MAX_STEP_BYTES:
                self._num_extra_bytes += num_bytes
                self.send("step", frame)
                frame, num_bytes = [], 0
        if frame:
            self._num_extra_bytes += num_bytes
            self.send("step", frame)


class ClientTable:
    """`is_draining` may be set, and `is_idle` be waited for, on any thread.

    The last `max_kv_events` of the executor's KV events are kept until a client asks for them.
    """

    def __init__(self, executor: ServedExecutor, max_kv_events: int = 0) -> None:
        self.clients: set[Client] = set()
        self.requests: RequestTable[Client] = RequestTable(executor.cancel_request)
        self.is_draining = False
        self.is_idle = threading.Event()
        self.is_idle.set()
        self._executor = executor
        self._journal = KvJournal()
        self._kv_changes = KvChanges(self._send_kv)
        self._kv_events: Records = collections.deque(maxlen=max_kv_events)
        self._stats: Records = collections.deque()

    def disconnect(self, client: Client) -> None:
        self.clients.discard(client)
        self.requests.disconnect(client)

    def ping(self) -> None:
        for client in tuple(self.clients):
            client.send("ping")

    def receive(self, client: Client, frame: wire.Frame) -> None:
        """Raises WireError for an unknown or malformed frame."""
        match frame:
            case ["add", fields]:
                self._add(client, GenerateRequest.from_wire(fields))
            case ["cancel", str(request_id)]:
                if not self.requests.cancel(request_id, client):
                    self._executor.cancel_request(request_id)  # it has ended; this ends the lease on its KV
            case ["find", int(number), str(request_id)]:
                self._find(client, number, request_id)
            case ["attach", int(number), str(request_id)]:
                self._attach(client, number, request_id)
            case ["stats", int(number)]:
                self._stats.extend(self._executor.get_latest_iteration_stats())
                client.send("stats", number, _take_records(self._stats))
            case ["kv_events", int(number)]:
                client.send("kv_events", number, _take_records(self._kv_events))
            case ["kv_subscribe"]:
                client.is_kv_subscriber = True
                client.send("kv_snapshot", *self._journal.snapshot())
            case ["kv_snapshot"]:
                client.send("kv_snapshot", *self._journal.snapshot())
            case _:
                raise WireError(f"unexpected {frame[0]!r} frame of {len(frame)} elements")

    def _add(self, client: Client, request: GenerateRequest) -> None:
        request_id = request.request_id
        if self.requests.is_running(request_id):
            error: TensorweaveError = RequestRejected(f"request id {request_id!r} is in use", param="request_id")
            client.send_chunks([TokenChunk(request_id, error=error)])
            return
        self.requests.add(request, client)
        self.is_idle.clear()
        try:
            if self.is_draining:
                raise NotReady("the gang is draining", retry_after_s=1.0)
            self._executor.enqueue_request(request)
        except TensorweaveError as refusal:
            self._deliver([TokenChunk(request_id, error=refusal)])
        except (ValueError, TypeError, OverflowError) as problem:
            self._deliver([TokenChunk(request_id, error=RequestRejected(str(problem)))])

    def _find(self, client: Client, number: int, request_id: str) -> None:
        if self.requests.find_detached(request_id) is None and self.requests.has_attached(request_id):
            asyncio.get_running_loop().call_later(DISCONNECT_WAIT_S, self._send_found, client, number, request_id)
        else:
            self._send_found(client, number, request_id)

    def _send_found(self, client: Client, number: int, request_id: str) -> None:
        served = self.requests.find_detached(request_id)
        client.send("found", number, None if served is None else [served.request_id, served.request.sampling.seed])

    def _attach(self, client: Client, number: int, request_id: str) -> None:
        """Send the answer so far, then its following chunks. An attempt that resumed another one has the beginning of
        the answer in its prompt."""
        served = self.requests.find_detached(request_id)
        if served is None:
            client.send("attached", number, None, [])
            return
        client.send("attached", number, served.request_id, served.replayed_tokens)
        if served.chunks:
            client.send_chunks(served.chunks)
        self.requests.attach(served, client)

    def publish(self, chunks: Sequence[TokenChunk], events: Sequence[dict[str, Any]]) -> None:
        """Send what the executor has produced to the clients."""
        self._kv_events.extend(events)
        if (changes := self._journal.add(events)) is not None:
            self._kv_changes.add(changes)
        self._deliver(chunks)

    def _send_kv(self, changes: Sequence[Any]) -> None:
        for client in self.clients:
            if client.is_kv_subscriber:
                client.send("kv", *changes)

    def _deliver(self, chunks: Sequence[TokenChunk]) -> None:
        """Send one frame per client. Chunks of detached requests are only recorded."""
        by_client: dict[Client, list[TokenChunk]] = {}
        for chunk in chunks:
            if (client := self.requests.record(chunk)) is not None:
                by_client.setdefault(client, []).append(chunk)
        for client, own_chunks in by_client.items():
            client.send_chunks(own_chunks)
        if not self.requests.num_running:
            self.is_idle.set()

    def fail(self, error: TensorweaveError) -> None:
        """Send the executor's failure to every request and every client."""
        self._deliver([TokenChunk(request_id, error=error) for request_id in self.requests.running_ids])
        for client in self.clients:
            client.send("error", error.to_wire())


def _take_records(records: Records) -> list[dict[str, Any]]:
    """Remove and return the oldest, as many as fit in a frame."""
    return [records.popleft() for _ in range(min(len(records), wire.MAX_RECORDS))]
