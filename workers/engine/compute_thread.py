"""Where an engine computes its steps: `Here`, as they are launched, or on a `ComputeThread`, while the step loop goes
on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Protocol, TypeVar

from tensorweave.workers.step.pending import Pending, Ready
from tensorweave.workers.step.resources import BaseResourceManager

T = TypeVar("T")
U = TypeVar("U")
Task = tuple[Callable[[], None], Callable[[BaseException], None]]

_JOIN_TIMEOUT_S: Final = 10.0


class ComputePlace(Protocol):
    def submit(self, compute: Callable[[], T]) -> Pending[T]:
        """Compute after all that was submitted before."""


class Here:
    """Computes at once, on the thread that asks."""

    def submit(self, compute: Callable[[], T]) -> Pending[T]:
        return Ready(compute())


class ComputeThread(BaseResourceManager):
    """Computes what is submitted on one thread, in order. After an error everything else fails with it: what follows
    may count on what was not computed. `shutdown` ends the thread, and so does the end of the process.
    `note_computed` is told the seconds of each computation, on the thread."""

    def __init__(self, name: str, note_computed: Callable[[float], None] = lambda seconds: None) -> None:
        self._note_computed = note_computed
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, compute: Callable[[], T]) -> Pending[T]:
        future: Future[T] = Future()
        self._tasks.put((lambda: future.set_result(compute()), future.set_exception))
        return _Submitted(self, future)

    def shutdown(self) -> None:
        self._tasks.put(None)
        self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        failure: BaseException | None = None
        while (task := self._tasks.get()) is not None:
            run, fail = task
            if failure is None:
                began_s = time.perf_counter()
                try:
                    run()
                except BaseException as error:  # the thread's boundary: whoever asks for the result gets it
                    failure = error
                self._note_computed(time.perf_counter() - began_s)
            if failure is not None:
                fail(failure)
            del task, run, fail


class _Submitted(Pending[T]):
    """A value that a `ComputeThread` computes."""

    __slots__ = ("_future", "_place")

    def __init__(self, place: ComputeThread, future: Future[T]) -> None:
        self._place = place
        self._future = future

    def result(self) -> T:
        return self._future.result()

    def then(self, continue_with: Callable[[T], U]) -> Pending[U]:
        return self._place.submit(lambda: continue_with(self._future.result()))
