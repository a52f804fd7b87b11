"""`BodyPool`: reads request bodies so that no body blocks the event loop, whatever is in it.

A small body is read in the event loop, at once, unless it asks for a form of the answer. Others are read by worker
processes (`router/bodies/worker.py`): some for bodies of a usual size, another one for larger bodies, so that usual
ones do not wait behind a body that was made to take long. That one has a low priority, and a usual body that takes long
loses its own: such bodies wait for the streams, and not the other way round.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
from collections.abc import Callable
from typing import Final, TypeVar

from tensorweave.cluster.wire import pack_frame
from tensorweave.router.bodies.body_queue import BodyQueue
from tensorweave.router.bodies.quick_look import may_take_long
from tensorweave.router.bodies.served import ServedModel
from tensorweave.router.bodies.tasks import BodyTask
from tensorweave.router.bodies.worker import STATE_LENGTH, Priority
from tensorweave.router.bodies.worker_process import WorkerParent
from tensorweave.router.text.tokens import Tokenizer

ResultT = TypeVar("ResultT")

INLINE_BYTES: Final = 2 << 10
"""At most about 2.5 ms of reading, for the slowest text that we know (emoji, 1.1 µs a byte). Texts of 1,000 tokens take
2.4 to 5 ms each: hundreds of them in the event loop would take a second from all streams."""
_SLOW_INLINE_BYTES: Final = 256
"""For tokenizers in transformers' own Python, which are slower."""
_CPUS_PER_WORKER: Final = 4
_MOST_WORKERS: Final = 4
"""For bodies of a usual size. Each has a tokenizer of its own, and reads at least 200,000 tokens a second."""
USUAL_BYTES: Final = 256 << 10
_MAX_WAITING: Final = {"usual": 1024, "large": 16}


class BodyPool:
    """`reads_inline`: small bodies are read in the event loop. A body with a chat template of its own may take long
    whatever its size; `looks_long` finds the others that may."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        reads_inline: bool = True,
        looks_long: Callable[[bytes], bool] = may_take_long,
    ) -> None:
        self._looks_long = looks_long
        self._tokenizer = tokenizer
        self._inline_bytes = 0
        if reads_inline:
            self._inline_bytes = INLINE_BYTES if tokenizer.is_rust else _SLOW_INLINE_BYTES
        self._state = b""
        num_workers = max(1, min(len(os.sched_getaffinity(0)) // _CPUS_PER_WORKER, _MOST_WORKERS))
        self._parent = WorkerParent(self._first_bytes)
        self._usual = self._queue("usual", Priority.USUAL, num_workers)
        self._large = self._queue("large", Priority.LOW)

    async def run(self, task: BodyTask[ResultT], body: bytes, served: ServedModel) -> ResultT:
        """Raises RequestRejected (BodyTooCostly if its worker was ended for it), Overloaded if too many bodies wait,
        DeadlineExceeded, and NotReady if no worker can be started."""
        if len(body) <= self._inline_bytes and not self._looks_long(body):
            return task.run(body, self._tokenizer, served)
        queue = self._usual if len(body) <= USUAL_BYTES else self._large
        return task.unpack(await queue.run(pack_frame("run", task.name, served.to_wire(), body)))

    async def warm_up(self) -> None:
        """Start a worker for bodies of a usual size, and scan the vocabulary, before the first body comes. Raises
        OSError."""
        _ = self._tokenizer.max_chars_per_token
        await self._usual.warm_up()

    async def close(self) -> None:
        await asyncio.gather(self._usual.close(), self._large.close())
        await self._parent.close()

    def _queue(self, kind: str, priority: Priority, num_workers: int = 1) -> BodyQueue:
        return BodyQueue(functools.partial(self._parent.start_worker, priority), _MAX_WAITING[kind], num_workers)

    def _first_bytes(self) -> bytes:
        """What the workers' parent reads first: the pickled tokenizer, for our own child process. Made once."""
        if not self._state:
            pickled = pickle.dumps(self._tokenizer)
            self._state = STATE_LENGTH.pack(len(pickled)) + pickled
        return self._state
