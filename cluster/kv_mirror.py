"""`KvMirror`: which full KV blocks one gang holds, by its leader's event frames.

A link owns it and applies `kv` and `kv_snapshot` frames; the router's policy reads it. Events are numbered within an
epoch. After a gap or at a new epoch the mirror is empty until a snapshot arrives: it may have fewer blocks than the
gang holds, but never one that the gang reported as removed.

    ["kv", epoch, first_seq, [event, …]]
        event: ["stored", parent_hash, hash, …] | ["removed", hash, …] | ["cleared"]
    ["kv_snapshot", epoch, next_seq, [[hash, parent_hash], …]]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from tensorweave.cluster.errors import WireError

_SLACK_BLOCKS: Final = 1024
"""Events may store a block before they remove another, so a few blocks more than the gang has are no error."""


class KvMirror:
    """`num_blocks` is the number of the gang's blocks, which bounds the memory. A link without events has an empty
    mirror."""

    def __init__(self, tokens_per_block: int, num_blocks: int) -> None:
        self.num_resyncs = 0
        self._tokens_per_block = tokens_per_block
        self._limit = num_blocks + _SLACK_BLOCKS
        self._held: set[bytes] = set()
        self._epoch = -1
        self._next_seq: int | None = None
        """The number of the next event; None while a snapshot is awaited."""
        self._seen_seq = 0
        """One past the newest event of this epoch, applied or not."""

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    @property
    def is_synced(self) -> bool:
        return self._next_seq is not None

    def cached_tokens(self, hashes: Iterable[bytes]) -> int:
        """How many leading tokens of a prompt with these block names the gang holds, in whole blocks."""
        num_blocks = 0
        for name in hashes:
            if name not in self._held:
                break
            num_blocks += 1
        return num_blocks * self._tokens_per_block

    def apply(self, frame: Sequence[Any]) -> bool:
        """Apply one frame. Return whether the caller must now send `["kv_snapshot"]`. Raises WireError."""
        match frame:
            case ["kv", int(epoch), int(first_seq), list(events)]:
                return self._apply_events(epoch, first_seq, events)
            case ["kv_snapshot", int(epoch), int(next_seq), list(pairs)]:
                return self._apply_snapshot(epoch, next_seq, pairs)
            case _:
                raise WireError("malformed kv frame")

    def _apply_events(self, epoch: int, first_seq: int, events: list[Any]) -> bool:
        if epoch < self._epoch:
            return False
        if epoch > self._epoch:
            self._forget(epoch, next_seq=0)
        self._seen_seq = max(self._seen_seq, first_seq + len(events))
        if self._next_seq is None:
            return False
        if first_seq > self._next_seq:
            return self._lose()
        for event in events[self._next_seq - first_seq :]:
            self._apply_event(event)
        self._next_seq = max(self._next_seq, first_seq + len(events))
        return self._lose() if len(self._held) > self._limit else False

    def _apply_event(self, event: Any) -> None:
        match event:
            case ["stored", bytes(), *hashes] if all(isinstance(name, bytes) for name in hashes):
                self._held.update(hashes)
            case ["removed", *hashes] if all(isinstance(name, bytes) for name in hashes):
                self._held.difference_update(hashes)
            case ["cleared"]:
                self._held.clear()
            case _:
                raise WireError("malformed kv event")

    def _apply_snapshot(self, epoch: int, next_seq: int, pairs: list[Any]) -> bool:
        """A snapshot that is older than the newest event is requested again."""
        if epoch < self._epoch or (epoch == self._epoch and self._next_seq is not None and next_seq <= self._next_seq):
            return False
        if epoch == self._epoch and next_seq < self._seen_seq:
            return True
        if len(pairs) > self._limit:
            raise WireError(f"a snapshot of {len(pairs)} blocks, the gang has at most {self._limit}")
        self._forget(epoch, next_seq)
        for pair in pairs:
            match pair:
                case [bytes(name), bytes()]:
                    self._held.add(name)
                case _:
                    raise WireError("malformed kv snapshot")
        return False

    def _forget(self, epoch: int, next_seq: int) -> None:
        self._held.clear()
        self._epoch, self._next_seq = epoch, next_seq
        self._seen_seq = next_seq

    def _lose(self) -> bool:
        self.num_resyncs += 1
        self._held.clear()
        self._next_seq = None
        return True
