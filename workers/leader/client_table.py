"""What front ends say to a gang's leader, and what they are told: `ClientTable`, and `Client`, one of them.

All of it is the loop thread's; `workers.leader` has the sockets and the threads. A client that ends has its requests
cancelled (after their grace, if they have one); one that does not read is cut off; neither harms the others. Clients
that follow the KV cache hear of its changes.
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
from tensorweave.workers.leader.kv_journal import KvJournal
from tensorweave.workers.leader.request_table import Streams

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES: Final = 8 << 20
"""A client that lets this much pile up, beside logits and log-probabilities that it asked for, is cut off."""
LOSS_WAIT_S: Final = 0.02
"""Who asks for a request of a router that was killed may be heard just before that router's connections break."""
MAX_STEP_BYTES: Final = 4 << 20
"""Of logits and log-probabilities in one frame, but for the last chunk's."""

_Rows = collections.deque[dict[str, Any]]


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


class Client:
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


class ClientTable:
    """`is_draining` may be set, and `is_idle` be waited for, on any thread.

    `max_kv_events` of the executor's KV events are kept for whoever asks for them; the oldest go first.
    """

    def __init__(self, executor: ServedExecutor, max_kv_events: int = 0) -> None:
        self.clients: set[Client] = set()
        self.streams: Streams[Client] = Streams(executor.cancel_request)
        self.is_draining = False
        self.is_idle = threading.Event()
        self.is_idle.set()
        self._executor = executor
        self._journal = KvJournal()
        self._kv_events: _Rows = collections.deque(maxlen=max_kv_events)
        self._stats: _Rows = collections.deque()

    def lose(self, client: Client) -> None:
        """Its connection has ended."""
        self.clients.discard(client)
        self.streams.lose(client)

    def ping(self) -> None:
        for client in tuple(self.clients):
            client.send("ping")

    def receive(self, client: Client, frame: wire.Frame) -> None:
        """Raises WireError for a frame that makes no sense."""
        match frame:
            case ["add", fields]:
                self._add(client, GenerateRequest.from_wire(fields))
            case ["cancel", str(request_id)]:
                if not self.streams.cancel(request_id, client):
                    self._executor.cancel_request(request_id)  # it has ended; what it still offers goes
            case ["find", int(number), str(request_id)]:
                self._find(client, number, request_id)
            case ["attach", int(number), str(request_id)]:
                self._attach(client, number, request_id)
            case ["stats", int(number)]:
                self._stats.extend(self._executor.get_latest_iteration_stats())
                client.send("stats", number, _take_rows(self._stats))
            case ["kv_events", int(number)]:
                client.send("kv_events", number, _take_rows(self._kv_events))
            case ["kv_subscribe"]:
                client.follows_kv = True
                client.send("kv_snapshot", *self._journal.snapshot())
            case ["kv_snapshot"]:
                client.send("kv_snapshot", *self._journal.snapshot())
            case _:
                raise WireError(f"unexpected {frame[0]!r} frame of {len(frame)} elements")

    def _add(self, client: Client, request: GenerateRequest) -> None:
        request_id = request.request_id
        if self.streams.runs(request_id):
            error: TensorweaveError = RequestRejected(f"request id {request_id!r} is in use", param="request_id")
            client.answer([TokenChunk(request_id, error=error)])
            return
        self.streams.open(request, client)
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
        if self.streams.find(request_id) is None and self.streams.is_heard(request_id):
            asyncio.get_running_loop().call_later(LOSS_WAIT_S, self._tell_found, client, number, request_id)
        else:
            self._tell_found(client, number, request_id)

    def _tell_found(self, client: Client, number: int, request_id: str) -> None:
        stream = self.streams.find(request_id)
        client.send("found", number, None if stream is None else [stream.request_id, stream.request.sampling.seed])

    def _attach(self, client: Client, number: int, request_id: str) -> None:
        """All that the answer has so far, then what comes. An attempt that began where another one broke off was given
        the answer's beginning with its prompt."""
        stream = self.streams.find(request_id)
        if stream is None:
            client.send("attached", number, None, [])
            return
        client.send("attached", number, stream.request_id, stream.replayed)
        if stream.chunks:
            client.answer(stream.chunks)
        self.streams.attach(stream, client)

    def pass_on(self, chunks: Sequence[TokenChunk], events: Sequence[dict[str, Any]]) -> None:
        """What one wake-up of the pump brought."""
        self._kv_events.extend(events)
        if (news := self._journal.add(events)) is not None:
            for client in self.clients:
                if client.follows_kv:
                    client.send("kv", *news)
        self._deliver(chunks)

    def _deliver(self, chunks: Sequence[TokenChunk]) -> None:
        """One frame a client. A request whose clients have gone is forgotten once its last chunk came."""
        by_client: dict[Client, list[TokenChunk]] = {}
        for chunk in chunks:
            if (client := self.streams.note(chunk)) is not None:
                by_client.setdefault(client, []).append(chunk)
        for client, mine in by_client.items():
            client.answer(mine)
        if not self.streams:
            self.is_idle.set()

    def fail(self, error: TensorweaveError) -> None:
        """The executor is no more: everyone hears why."""
        self._deliver([TokenChunk(request_id, error=error) for request_id in self.streams.running_ids])
        for client in self.clients:
            client.send("error", error.to_wire())


def _take_rows(rows: _Rows) -> list[dict[str, Any]]:
    """The oldest, as many as a frame holds."""
    return [rows.popleft() for _ in range(min(len(rows), wire.MAX_ROWS))]
