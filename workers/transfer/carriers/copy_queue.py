"""`CopyQueue`: waits for copies, in the order in which they were begun, while the thread that begins them goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from tensorweave.workers.transfer.block_sink import FinishCopy


class CopyQueue:
    """`add`, `then` and `close` are called by one thread. The queue's own thread begins with the first copy; it calls
    `fail` with a reason if one fails, and goes on: all copies that were begun are waited for. While there are none,
    `then` calls at once, without a change of threads."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._num_added = 0
        self._num_over = 0

    def add(self, finish: FinishCopy) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
            self._thread.start()
        self._num_added += 1
        self._queue.put(finish)

    def then(self, call: Callable[[], None]) -> None:
        """Call once the copies before are over."""
        if self._num_over == self._num_added:
            call()
        else:
            self.add(call)

    def close(self, timeout_s: float) -> None:
        """No more will be added: wait until all copies are over."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except RuntimeError as error:  # the GPU has failed
                self._fail(f"a copy from the sender's GPU failed: {error}")
            finally:
                self._num_over += 1
