"""What leaves the step loop: chunks of tokens, collected by whoever awaits them.

`Outbox` belongs to rank 0; `FollowerOutbox` is the Null object of the other ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence

from tensorweave.cluster.protocol import TokenChunk


class Outbox:
    """The step loop puts chunks; one or more threads take them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._chunks: list[TokenChunk] = []
        self._is_closed = False

    def put(self, chunks: Sequence[TokenChunk]) -> None:
        if not chunks:
            return
        with self._changed:
            self._chunks.extend(chunks)
            self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits: no more chunks will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def take(self, timeout_s: float | None) -> list[TokenChunk]:
        """Take all chunks. If there is none, wait for one until the timeout or the close."""
        with self._changed:
            if not self._chunks and not self._is_closed:
                self._changed.wait(timeout_s)
            chunks, self._chunks = self._chunks, []
            return chunks

    def take_of(self, request_ids: Collection[str], timeout_s: float | None) -> list[TokenChunk]:
        """Take the chunks of these requests and leave the others'."""
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                mine = [chunk for chunk in self._chunks if chunk.request_id in request_ids]
                if mine:
                    self._chunks = [chunk for chunk in self._chunks if chunk.request_id not in request_ids]
                    return mine
                left_s = None if give_up_s is None else give_up_s - time.monotonic()
                if self._is_closed or (left_s is not None and left_s <= 0):
                    return []
                self._changed.wait(left_s)


class FollowerOutbox:
    """Ranks other than 0 answer nobody."""

    def put(self, chunks: Sequence[TokenChunk]) -> None:
        return None

    def close(self) -> None:
        return None

    def take(self, timeout_s: float | None) -> list[TokenChunk]:
        raise AssertionError("only rank 0 answers")

    def take_of(self, request_ids: Collection[str], timeout_s: float | None) -> list[TokenChunk]:
        raise AssertionError("only rank 0 answers")
