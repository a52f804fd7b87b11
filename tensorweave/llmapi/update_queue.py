"""`UpdateQueue`: what an LLM's event loop has sent to a `RequestOutput`, until a consumer, in any thread or event loop,
takes it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Iterable

from tensorweave.llmapi.completion_output import Update
from tensorweave.llmapi.own_process import OwnProcess


class UpdateQueue:
    """Hold `lock` while taking and applying updates. A queue that is not `is_live` belongs to a copy of an output, and
    nothing is added to it. `what` names the request in errors.
    """

    def __init__(self, what: str, updates: Iterable[Update] = (), *, is_live: bool = True) -> None:
        self.lock = threading.Condition()
        self.process = OwnProcess(what)
        self.is_live = is_live
        self._what = what
        self._updates = collections.deque(updates)
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def put(self, update: Update) -> None:
        with self.lock:
            self._updates.append(update)
            self.lock.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            with contextlib.suppress(RuntimeError):  # that loop has been closed
                loop.call_soon_threadsafe(_wake, waiter)

    def take(self) -> Update | None:
        """Remove and return the oldest; None if another consumer took it."""
        return self._updates.popleft() if self._updates else None

    def all(self) -> list[Update]:
        """The updates that nobody has taken yet. They stay in the queue."""
        return list(self._updates)

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for an update and return whether there is one in time. Raises RuntimeError if none can come."""
        self.process.check()
        with self.lock:
            self._check_live()
            return self.lock.wait_for(lambda: bool(self._updates), timeout_s)

    async def wait_async(self) -> None:
        self.process.check()
        loop = asyncio.get_running_loop()
        with self.lock:
            self._check_live()
            if self._updates:
                return
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.append((loop, waiter))
        await waiter

    def _check_live(self) -> None:
        if not (self._updates or self.is_live):
            raise RuntimeError(
                f"this is a copy of {self._what}, made before that was finished: no more will come here; "
                "wait for the original, and copy it then"
            )


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
