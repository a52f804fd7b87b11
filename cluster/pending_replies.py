"""`PendingReplies`: the questions on a connection that were sent with a number and are not answered yet."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorweave.cluster.errors import TensorweaveError, error_from_wire


class PendingReplies:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._futures: dict[int, asyncio.Future[Any]] = {}

    @contextmanager
    def open(self) -> Iterator[tuple[int, asyncio.Future[Any]]]:
        """A new question's number, and the future of its reply, which is pending inside the block."""
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        self._futures[number] = future
        try:
            yield number, future
        finally:
            del self._futures[number]

    def find(self, number: int) -> asyncio.Future[Any] | None:
        """None if there is no such question, or it was answered or cancelled."""
        future = self._futures.get(number)
        return None if future is None or future.done() else future

    def fail_all(self, error: TensorweaveError) -> None:
        for future in self._futures.values():
            if not future.done():
                future.set_exception(copy_error(error))


def copy_error(error: TensorweaveError) -> TensorweaveError:
    """A new exception object per raise, so that tracebacks do not accumulate on a shared one."""
    return error_from_wire(error.to_wire())
