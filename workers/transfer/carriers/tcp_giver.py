"""`Visitor`: the giving side of one connection of `TcpCarrier`: a thread reads claims, a thread sends blocks."""

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
from tensorweave.workers.transfer.carriers.carrier import Claim, EventQueue, TicketOver
from tensorweave.workers.transfer.carriers.stream import ALIVE_INTERVAL_S, Stream
from tensorweave.workers.transfer.giving.desk import Blocks, Desk, End, Parcel, Serving
from tensorweave.workers.transfer.lanes.lane import GivingLane, LaneKind

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


class Visitor:
    def __init__(self, entry: Entry, desk: Desk, events: EventQueue, kinds: Sequence[LaneKind]) -> None:
        self.is_gone = False
        self._entry = entry
        self._stream = Stream(entry.sock)
        self._desk = desk
        self._events = events
        self._servings: dict[int, Serving] = {}
        self._lanes = {kind.name: kind.giving() for kind in kinds}
        self._lane: GivingLane | None = None
        self._probes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="kv-visitor-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="kv-visitor-writer", daemon=True)
        self._reader.start()

    def close(self) -> None:
        self.is_gone = True
        self._stream.close()
        self._desk.poke()

    def join(self, timeout_s: float) -> None:
        for thread in (self._reader, self._writer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout_s)

    # ---- what the taker says

    def _read(self) -> None:
        try:
            self._desk.window.use_own_stream()
            self._lane = self._greet()
            self._writer.start()
            while True:
                self._take(*self._stream.receive())
        except (TransferFailed, WireError) as error:
            if self._lane is None:
                self._entry.log.tell(f"a connection to the KV endpoint ends before it is greeted: {error}")
            elif not self.is_gone:
                logger.info("a KV taker's connection ends: %s", error)
        finally:
            self._entry.is_known()
            self.close()
            for serving in self._servings.values():
                self._leave(serving)

    def _greet(self) -> GivingLane:
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
        greetings = {} if refusal else {name: lane.greeting() for name, lane in self._lanes.items()}
        self._stream.send("hello", PROTOCOL_VERSION, refusal, greetings)
        if refusal:
            raise WireError(refusal)
        self._entry.is_known()
        self._stream.trust(max_body_bytes=0)
        frame, _ = self._stream.receive()
        match frame:
            case ["lane", str(name)] if name in self._lanes:
                return self._lanes[name]
        raise WireError("the second frame must name a lane")

    def _take(self, frame: Frame, body_bytes: int) -> None:
        match frame:
            case ["claim", int(number), *fields]:
                assert self._lane is not None
                serving = Serving(self._desk, claim_from_wire(fields), self._lane.loader)
                self._servings = {**self._servings, number: serving}
                self._desk.poke()
            case ["close", int(number)]:
                servings = dict(self._servings)
                closed = servings.pop(number, None)
                self._servings = servings
                if closed is not None:
                    self._leave(closed)
            case ["probe", int(num_bytes)] if 0 <= num_bytes <= MAX_PROBE_BYTES:
                self._probes.put(num_bytes)
                self._desk.poke()
            case ["alive"]:
                pass
            case _:
                raise WireError(f"a giver takes no {frame[0]!r}")

    def _leave(self, serving: Serving) -> None:
        if serving.claim.ends_lease:
            self._events.put(TicketOver(serving.claim.ticket_id))

    # ---- what it gets

    def _write(self) -> None:
        lane = self._lane
        assert lane is not None
        try:
            self._desk.window.use_own_stream()
            lane.open(self._stream)
            sent_s = time.monotonic()
            while not self.is_gone:
                version = self._desk.version
                while not self._probes.empty():
                    lane.probe(self._probes.get())
                if sum(self._serve(lane, number, serving) for number, serving in self._servings.items()):
                    sent_s = time.monotonic()
                    continue
                self._desk.wait(version, sent_s + ALIVE_INTERVAL_S - time.monotonic())
                if time.monotonic() >= sent_s + ALIVE_INTERVAL_S:
                    self._stream.send("alive")
                    sent_s = time.monotonic()
        except TransferFailed as error:
            logger.info("a KV giver's connection ends: %s", error)  # the reader hears of it too
        finally:
            self._stream.close()
            lane.close()

    def _serve(self, lane: GivingLane, number: int, serving: Serving) -> bool:
        """Whether there was something to send."""
        if serving.is_over:
            return False
        parcel = serving.next(lane.staging(serving.parcel_bytes))
        if parcel is None:
            return False
        self._send(lane, number, parcel)
        return True

    def _send(self, lane: GivingLane, number: int, parcel: Parcel) -> None:
        if isinstance(parcel, Blocks):
            rows = [[row.index, row.tag, row.num_tokens] for row in parcel.rows]
            self._stream.send("rows", number, rows, body=parcel.digests, is_held=True)
            lane.ship(parcel.payload, "blocks", number, [[row.index, row.tag] for row in parcel.rows])
        elif isinstance(parcel, End):
            extras = None if parcel.extras is None else parcel.extras.to_wire()
            self._stream.send("end", number, parcel.first_token, extras)
        else:
            self._stream.send("fail", number, parcel.kind, parcel.reason)


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
