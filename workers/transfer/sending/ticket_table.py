"""`TicketTable`: the offers of one rank, by ticket. Every carrier serves reads from it."""

from __future__ import annotations

import collections
import threading
from typing import Final

from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.window import PoolWindow

_MAX_REMEMBERED_TICKETS: Final = 65_536


class TicketTable:
    """`version` is incremented by every change that may give a read something new to send."""

    def __init__(self, window: PoolWindow, fingerprint: dict[str, str]) -> None:
        self.window = window
        self.fingerprint = fingerprint
        self.version = 0
        self._changed = threading.Condition()
        self._offers: dict[str, OfferedBlocks] = {}
        self._closed: collections.OrderedDict[str, None] = collections.OrderedDict()

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        with self._changed:
            if ticket_id not in self._closed:
                self._offers[ticket_id] = offered
        self.notify()

    def close(self, ticket_id: str) -> None:
        """The ticket is remembered: a later read of it is refused at once and does not wait for an offer."""
        with self._changed:
            self._offers.pop(ticket_id, None)
            self._closed[ticket_id] = None
            if len(self._closed) > _MAX_REMEMBERED_TICKETS:
                self._closed.popitem(last=False)
        self.notify()

    def notify(self) -> None:
        """Wake the threads that wait for something to send."""
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def wait(self, seen_version: int, timeout_s: float) -> None:
        """Wait until `version` is not `seen_version`, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != seen_version, timeout_s)

    def is_closed(self, ticket_id: str) -> bool:
        return ticket_id in self._closed

    def find(self, ticket_id: str) -> OfferedBlocks | None:
        return self._offers.get(ticket_id)
