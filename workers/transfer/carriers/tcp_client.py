"""`TcpClientConnection`: the taking side of one connection of `TcpCarrier`, from before it is open until it breaks.

A thread connects and reads what comes into sinks, a thread sends claims.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.wire import Frame
from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.carrier import (
    FAILURE_KINDS,
    Claim,
    Ended,
    EventQueue,
    Failed,
    FailureKind,
    Sink,
)
from tensorweave.workers.transfer.carriers.tcp_server import MAX_PROBE_BYTES, claim_to_wire
from tensorweave.workers.transfer.sending.offered_blocks import Row
from tensorweave.workers.transfer.transports.frame_connection import ALIVE_INTERVAL_S, SILENCE_S, Stream, tensor_bytes
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES
from tensorweave.workers.transfer.transports.transport import TakingTransport, TransportKind
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

_CLOSE: Final = ("close-the-link",)


class TcpClientConnection:
    """`is_lost`: it takes no more claims; those it had have failed."""

    def __init__(
        self,
        place: tuple[str, int],
        secret: str,
        window: PoolWindow,
        events: EventQueue,
        kinds: Sequence[TransportKind],
    ) -> None:
        self.is_lost = False
        self._kind: FailureKind = "peer_lost"
        self._reason = ""
        self._place = place
        self._secret = secret
        self._kinds = kinds
        self._events = events
        self._max_body_bytes = max(HOST_MESSAGE_BYTES, window.block_bytes(len(window.heads)), MAX_PROBE_BYTES)
        self._window = window
        self._staging = window.new_staging(0)
        self._staging_bytes = tensor_bytes(self._staging)
        self._lock = threading.Lock()
        self._claims: dict[int, tuple[Claim, Sink]] = {}
        self._num_claims = 0
        self._outbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._probes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._probing = threading.Lock()
        self._stream: Stream | None = None
        self._reader = threading.Thread(target=self._read, name="kv-link-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="kv-link-writer", daemon=True)
        self._reader.start()

    def add(self, claim: Claim, sink: Sink) -> None:
        with self._lock:
            if not self.is_lost:
                self._num_claims += 1
                self._claims[self._num_claims] = (claim, sink)
                self._outbox.put(("claim", self._num_claims, *claim_to_wire(claim)))
                return
        self._events.put(Failed(claim.claim_id, self._kind, f"{self._name()} is lost: {self._reason}"))

    def leave(self, ticket_id: str) -> None:
        """End the claims under this ticket; what still comes for them is thrown away."""
        with self._lock:
            leaving = [number for number, (claim, _) in self._claims.items() if claim.ticket_id == ticket_id]
            for number in leaving:
                del self._claims[number]
                self._outbox.put(("close", number))

    def probe(self, num_bytes: int, timeout_s: float) -> float:
        with self._probing:
            start_s = time.monotonic()
            self._outbox.put(("probe", num_bytes))
            try:
                is_here = not self.is_lost and self._probes.get(timeout=max(0.0, timeout_s))
            except queue.Empty:
                is_here = False
                self._lose(f"{num_bytes} bytes have not come within {timeout_s:g} s")
            if not is_here:
                raise TransferFailed(f"{self._name()} is lost: {self._reason}")
            return time.monotonic() - start_s

    def close(self) -> None:
        self._lose("it was closed")

    def join(self, timeout_s: float) -> None:
        for thread in (self._reader, self._writer):
            if thread.ident is not None:
                thread.join(timeout_s)

    def _name(self) -> str:
        return f"the KV connection to {self._place[0]}:{self._place[1]}"

    # ---- reading

    def _read(self) -> None:
        reason, transport = "its reader has ended", None
        try:
            self._window.use_own_stream()
            stream, transport = self._open()
            self._writer.start()
            transport.open(stream)
            while True:
                self._take(stream, transport, *stream.receive())
        except (TransferFailed, WireError) as error:
            reason = error.message
        finally:
            self._lose(reason)
            if transport is not None:
                transport.close()

    def _open(self) -> tuple[Stream, TakingTransport]:
        try:
            sock = socket.create_connection(self._place, timeout=SILENCE_S)
        except OSError as error:
            raise TransferFailed(f"cannot connect: {error}") from None
        stream = Stream(sock)
        with self._lock:
            self._stream = stream
            if self.is_lost:
                stream.close()
        stream.send("hello", PROTOCOL_VERSION, self._secret)
        frame, _ = stream.receive()
        match frame:
            case ["hello", int(), "", dict(greetings)]:
                stream.trust(self._max_body_bytes)
                return stream, self._pick_transport(stream, greetings)
            case ["hello", int(), str(refusal), *_]:
                raise TransferFailed(f"refused: {refusal}")
            case _:
                raise WireError("the answer to hello must be hello")

    def _pick_transport(self, stream: Stream, greetings: dict[str, Any]) -> TakingTransport:
        """The first of ours that can lead there."""
        for kind in self._kinds:
            transport, greeting = kind.taking(), greetings.get(kind.name)
            if isinstance(greeting, dict) and transport.fits(greeting):
                logger.info("%s takes the %s transport", self._name(), kind.name)
                stream.send("transport", kind.name)
                return transport
        self._kind = "no_transport"
        ours = ", ".join(kind.name for kind in self._kinds)
        raise TransferFailed(f"no transport leads there: {', '.join(greetings)} are there, {ours} here")

    def _take(self, stream: Stream, transport: TakingTransport, frame: Frame, body_bytes: int) -> None:
        if body_bytes > len(self._staging):
            self._staging = self._window.new_staging(body_bytes)
            self._staging_bytes = tensor_bytes(self._staging)
        stream.receive_into(self._staging_bytes[:body_bytes])
        body = self._staging[:body_bytes]
        match frame:
            case ["rows", int(number), list(fields)]:
                sink = self._sink(number)
                if sink is not None:
                    sink.announce([_row(row) for row in fields], self._staging_bytes[:body_bytes].tobytes())
            case ["blocks", int(number), list(fields)]:
                payload = transport.land(body, self._claim(number))
                sink = self._sink(number)
                if sink is not None:
                    sink.put([_block(block) for block in fields], payload)
            case ["end", int(number), int() | None as first_token, list() | None as extras]:
                claim = self._claim(number)
                if claim is not None:
                    told = None if extras is None else TokenExtras.from_wire(extras)
                    self._events.put(Ended(claim.claim_id, first_token, told))
            case ["fail", int(number), str(kind), str(reason)] if kind in FAILURE_KINDS:
                claim = self._claim(number)
                if claim is not None:
                    self._events.put(Failed(claim.claim_id, _kind(kind), reason))
            case ["probe"]:
                transport.land(body, None)
                self._probes.put(True)
            case ["alive"]:
                pass
            case _:
                raise WireError(f"a taker takes no {frame[0]!r}")

    def _sink(self, number: int) -> Sink | None:
        with self._lock:
            return self._claims[number][1] if number in self._claims else None

    def _claim(self, number: int) -> Claim | None:
        with self._lock:
            return self._claims[number][0] if number in self._claims else None

    # ---- writing, and the end

    def _write(self) -> None:
        stream = self._stream
        assert stream is not None
        try:
            while True:
                try:
                    frame = self._outbox.get(timeout=ALIVE_INTERVAL_S)
                except queue.Empty:
                    frame = ("alive",)
                if frame is _CLOSE:
                    return
                stream.send(*frame)
        except TransferFailed:
            stream.close()

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self.is_lost:
                return
            self.is_lost, self._reason = True, reason
            claims, self._claims = self._claims, {}
            stream = self._stream
        self._outbox.put(_CLOSE)
        self._probes.put(False)
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
        logger.info("%s ends: %s", self._name(), reason)
        for claim, _ in claims.values():
            self._events.put(Failed(claim.claim_id, self._kind, f"{self._name()} ends: {reason}"))


def _kind(kind: str) -> FailureKind:
    return next(known for known in FAILURE_KINDS if known == kind)


def _row(fields: Any) -> Row:
    match fields:
        case [int(index), int(tag), int(num_tokens)]:
            return Row(index, tag, num_tokens)
    raise WireError("malformed row")


def _block(fields: Any) -> tuple[int, int]:
    match fields:
        case [int(index), int(tag)]:
            return index, tag
    raise WireError("malformed block")
