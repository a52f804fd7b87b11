"""`KvJournal`: the blocks that a gang holds, by its KV events, in the form that front ends read (`cluster.kv_mirror`).

The leader adds the executor's events. Subscribed clients receive each batch; a client that subscribes, or has missed a
batch, receives a snapshot. The KV manager is never asked, since it belongs to the step loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
