"""`BodyMemory`: limits the bytes of request bodies that one router holds at a time, over all its connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensorweave.cluster.errors import Overloaded


class BodyMemory:
    """Shared by all requests. A body counts from its first byte until its request has been prepared."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """One request's part, released at the end at the latest."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.release()

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
        """Raises Overloaded if all requests together would hold too much."""
        self._memory.take(num_bytes)
        self.num_bytes += num_bytes

    def release(self) -> None:
        self._memory.num_bytes -= self.num_bytes
        self.num_bytes = 0
