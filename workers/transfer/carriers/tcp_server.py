"""`TcpServerConnection`: the giving end of a connection of `TcpCarrier`; one thread reads claims, one sends blocks."""

from __future__ import annotations

import hmac
import logging
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.cluster.limited_log import LimitedLog
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.wire import Frame
from tensorweave.workers.gang.door import Door
from tensorweave.workers.transfer.carrier import Claim, EventQueue, TicketOver
from tensorweave.workers.transfer.sending.ticket_table import Blocks, End, Message, Serving, TicketTable
from tensorweave.workers.transfer.transports.frame_connection import ALIVE_INTERVAL_S, Stream
from tensorweave.workers.transfer.transports.transport import GivingTransport, TransportKind

logger = logging.getLogger(__name__)

MAX_PROBE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A connection that has come through the door, and what its peer must show."""

    sock: socket.socket
    door: Door
    secret: str
    log: LimitedLog

    def check(self, offered: str) -> bool:
        return hmac.compare_digest(offered.encode(), self.secret.encode())

    def is_known(self) -> None:
        self.door.know(self.sock)


class TcpServerConnection:
    def __init__(self, entry: Entry, table: TicketTable, events: EventQueue, kinds: Sequence[TransportKind]) -> None:
        self.is_gone = False
        self._entry = entry
        self._stream = Stream(entry.sock)
        self._table = table
        self._events = events
        self._servings: dict[int, Serving] = {}
        self._transports = {kind.name: kind.giving() for kind in kinds}
        self._transport: GivingTransport | None = None
        self._probes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="kv-connection-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="kv-connection-writer", daemon=True)
        self._reader.start()

    def close(self) -> None:
        self.is_gone = True
        self._stream.close()
        self._table.poke()

    def join(self, timeout_s: float) -> None:
        for thread in (self._reader, self._writer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout_s)

    # ---- what the taker says

    def _read(self) -> None:
        try:
            self._table.window.use_own_stream()
            self._transport = self._greet()
            self._writer.start()
            while True:
                self._take(*self._stream.receive())
        except (TransferFailed, WireError) as error:
            if self._transport is None:
                self._entry.log.tell(f"a connection to the KV endpoint ends before it is greeted: {error}")
            elif not self.is_gone:
                logger.info("a KV taker's connection ends: %s", error)
        finally:
            self._entry.is_known()
            self.close()
            for serving in self._servings.values():
                self._leave(serving)

    def _greet(self) -> GivingTransport:
        frame, body_bytes = self._stream.receive()
        match frame:
            case ["hello", int(version), str(secret)] if not body_bytes:
                pass
            case _:
                raise WireError("the first frame must be hello")
        refusal = ""
        if version != PROTOCOL_VERSION:
            refusal = f"protocol version {version}, here it is {PROTOCOL_VERSION}"
        elif not self._entry.check(secret):
            refusal = "wrong secret"
        greetings = {} if refusal else {name: transport.greeting() for name, transport in self._transports.items()}
        self._stream.send("hello", PROTOCOL_VERSION, refusal, greetings)
        if refusal:
            raise WireError(refusal)
        self._entry.is_known()
        self._stream.trust(max_body_bytes=0)
        frame, _ = self._stream.receive()
        match frame:
            case ["transport", str(name)] if name in self._transports:
                return self._transports[name]
        raise WireError("the second frame must name a transport")

    def _take(self, frame: Frame, body_bytes: int) -> None:
        match frame:
            case ["claim", int(number), *fields]:
                assert self._transport is not None
                serving = Serving(self._table, claim_from_wire(fields), self._transport.loader)
                self._servings = {**self._servings, number: serving}
                self._table.poke()
            case ["close", int(number)]:
                servings = dict(self._servings)
                closed = servings.pop(number, None)
                self._servings = servings
                if closed is not None:
                    self._leave(closed)
            case ["probe", int(num_bytes)] if 0 <= num_bytes <= MAX_PROBE_BYTES:
                self._probes.put(num_bytes)
                self._table.poke()
            case ["alive"]:
                pass
            case _:
                raise WireError(f"a giver takes no {frame[0]!r}")

    def _leave(self, serving: Serving) -> None:
        if serving.claim.ends_lease:
            self._events.put(TicketOver(serving.claim.ticket_id))

    # ---- what it gets

    def _write(self) -> None:
        transport = self._transport
        assert transport is not None
        try:
            self._table.window.use_own_stream()
            transport.open(self._stream)
            sent_s = time.monotonic()
            while not self.is_gone:
                version = self._table.version
                while not self._probes.empty():
                    transport.probe(self._probes.get())
                if sum(self._serve(transport, number, serving) for number, serving in self._servings.items()):
                    sent_s = time.monotonic()
                    continue
                self._table.wait(version, sent_s + ALIVE_INTERVAL_S - time.monotonic())
                if time.monotonic() >= sent_s + ALIVE_INTERVAL_S:
                    self._stream.send("alive")
                    sent_s = time.monotonic()
        except TransferFailed as error:
            logger.info("a KV giver's connection ends: %s", error)  # the reader hears of it too
        finally:
            self._stream.close()
            transport.close()

    def _serve(self, transport: GivingTransport, number: int, serving: Serving) -> bool:
        """Whether there was something to send."""
        if serving.is_over:
            return False
        message = serving.next(transport.staging(serving.message_bytes))
        if message is None:
            return False
        self._send(transport, number, message)
        return True

    def _send(self, transport: GivingTransport, number: int, message: Message) -> None:
        if isinstance(message, Blocks):
            rows = [[row.index, row.tag, row.num_tokens] for row in message.rows]
            self._stream.send("rows", number, rows, body=message.digests, is_held=True)
            transport.ship(message.payload, "blocks", number, [[row.index, row.tag] for row in message.rows])
        elif isinstance(message, End):
            extras = None if message.extras is None else message.extras.to_wire()
            self._stream.send("end", number, message.first_token, extras)
        else:
            self._stream.send("fail", number, message.kind, message.reason)


def claim_to_wire(claim: Claim) -> list[Any]:
    heads = [claim.first_head, claim.num_heads]
    return [claim.ticket_id, claim.fingerprint, claim.prompt, *heads, claim.first_block, claim.only, claim.ends_lease]


def claim_from_wire(fields: list[Any]) -> Claim:
    match fields:
        case [str(ticket), dict(fingerprint), str(prompt), int(head), int(num), int(block), list(only), bool(ends)]:
            is_natural = all(type(n) is int and n >= 0 for n in [head, num, block, *only])
            if is_natural and all(isinstance(text, str) for pair in fingerprint.items() for text in pair):
                return Claim("", ticket, fingerprint, prompt, head, num, block, tuple(only), ends)
    raise WireError("malformed claim")
