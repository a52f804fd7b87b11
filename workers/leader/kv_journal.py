"""`KvJournal`: the blocks that a gang holds, by its KV events, in the form that front ends read (`cluster.kv_mirror`).

The leader adds the executor's events. Subscribed clients receive each batch; a client that subscribes, or has missed a
batch, receives a snapshot. The KV manager is never asked, since it belongs to the step loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

KV_INTERVAL_S: Final = 0.05
"""A frame costs a router about as much as 20 blocks in it, and a router reads those of all gangs."""


class KvJournal:
    """Holds one entry per full block of the gang.

    If an event was dropped before it was added, a new epoch begins with the next one: the journal then has fewer blocks
    than the gang, never more.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._next_seq = 0
        self._next_event_id = 0
        self._parents: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def snapshot(self) -> list[Any]:
        """The fields of a "kv_snapshot" frame."""
        return [self._epoch, self._next_seq, [[name, parent] for name, parent in self._parents.items()]]

    def add(self, events: Sequence[Mapping[str, Any]]) -> list[Any] | None:
        """Add the executor's events, in order. Return the fields of a "kv" frame, or None if nothing has changed."""
        batch: list[list[Any]] = []
        has_gap = False
        for event in events:
            if event["event_id"] != self._next_event_id:
                has_gap = True
                self._epoch, self._next_seq, batch = self._epoch + 1, 0, []
                self._parents.clear()
            self._next_event_id = event["event_id"] + 1
            self._add_event(event["data"], batch)
        if not batch and not has_gap:
            return None
        first_seq = self._next_seq
        self._next_seq += len(batch)
        return [self._epoch, first_seq, batch]

    def _add_event(self, data: Mapping[str, Any], batch: list[list[Any]]) -> None:
        """Append one event to `batch`; blocks that follow each other in a prompt are combined."""
        if data["type"] == "stored":
            parent = bytes.fromhex(data["parent_hash"])
            for block in data["blocks"]:
                name = bytes.fromhex(block["block_hash"])
                self._parents[name] = parent
                if batch and batch[-1][0] == "stored" and batch[-1][-1] == parent:
                    batch[-1].append(name)
                else:
                    batch.append(["stored", parent, name])
                parent = name
        elif data["type"] == "removed":
            names = [bytes.fromhex(name) for name in data["block_hashes"]]
            for name in names:
                self._parents.pop(name, None)
            batch.append(["removed", *names])


class KvChanges:
    """Changes to send: at once, or together `KV_INTERVAL_S` after those before. Used on an event loop."""

    def __init__(self, send: Callable[[list[Any]], None]) -> None:
        self._send = send
        self._waiting: list[list[Any]] = []
        """The fields of "kv" frames, one per epoch."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, fields: list[Any]) -> None:
        """The fields of a "kv" frame, in the journal's order."""
        epoch, _, batch = fields
        if self._waiting and self._waiting[-1][0] == epoch:
            self._waiting[-1][2].extend(batch)
        else:
            self._waiting.append(fields)
        if self._timer is None:
            self._flush()

    def _flush(self) -> None:
        self._timer = None
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(KV_INTERVAL_S, self._flush)
        waiting, self._waiting = self._waiting, []
        for fields in waiting:
            self._send(fields)
