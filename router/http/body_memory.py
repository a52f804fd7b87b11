"""`BodyMemory`: how many bytes of request bodies one router holds at a time, over all its connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensorweave.cluster.errors import Overloaded


class BodyMemory:
    """Shared by all requests. A body counts from its first byte until its request has been planned."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """One request's part, given back at the end at the latest."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.give_back()

    def take(self, num_bytes: int) -> None:
        """Raises Overloaded."""
        if self.num_bytes + num_bytes > self._max_bytes:
            raise Overloaded(
                f"the server holds {self.num_bytes} bytes of request bodies; the limit is {self._max_bytes}"
            )
        self.num_bytes += num_bytes


class BodyShare:
    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises Overloaded where all requests together would hold too much."""
        self._memory.take(num_bytes)
        self.num_bytes += num_bytes

    def give_back(self) -> None:
        self._memory.num_bytes -= self.num_bytes
        self.num_bytes = 0
