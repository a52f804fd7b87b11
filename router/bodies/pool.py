"""`BodyPool`: reads request bodies so that no body blocks the event loop, whatever is in it.

A small body is read in the event loop, at once. Others are read by a worker process (`router/bodies/worker.py`): one
for bodies of a usual size, another one for larger bodies, so that usual ones do not wait behind a body that was made to
take long. A worker is replaced when a body takes too much processor time or memory, and when its memory has grown much.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any, Final, TypeVar

from tensorweave.cluster.errors import (
    DeadlineExceeded,
    NotReady,
    Overloaded,
    RequestRejected,
    TensorweaveError,
    error_from_wire,
)
from tensorweave.cluster.wire import Frame, FrameReader, pack_frame
from tensorweave.router.bodies.served import ServedModel
from tensorweave.router.bodies.tasks import BodyTask
from tensorweave.router.bodies.worker import CPU_LIMIT_S, STATE_LENGTH
from tensorweave.router.text.tokens import Tokenizer

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

INLINE_BYTES: Final = 8 << 10
"""At most about 10 ms of reading, for the slowest text that we know (emoji, 1.1 µs a byte)."""
_SLOW_INLINE_BYTES: Final = 1 << 10
"""For tokenizers in transformers' own Python, which are slower."""
USUAL_BYTES: Final = 256 << 10
_MAX_WAITING: Final = {"usual": 1024, "large": 16}
_LARGE_NICENESS: Final = 10
"""Of the worker for large bodies: where the step loops of a gang want all cores, it takes a tenth of one."""
_GROWTH_BYTES: Final = 128 << 20
"""A worker whose peak memory has grown by so much is replaced, because it may not return that memory."""
_TIMEOUT_S: Final = 120.0
"""For one body. A worker that does not answer for so long within its limit of processor time is stopped or starved."""
_EXIT_TIMEOUT_S: Final = 5.0
_MAX_TRIES: Final = 2


class BodyTooCostly(RequestRejected):
    """Reading the body took more than a worker may take."""

    code = "body_too_costly"


class BodyPool:
    """`reads_inline`: small bodies are read in the event loop. A body with a chat template of its own may take long
    whatever its size."""

    def __init__(self, tokenizer: Tokenizer, *, reads_inline: bool = True) -> None:
        self._tokenizer = tokenizer
        self._inline_bytes = 0
        if reads_inline:
            self._inline_bytes = INLINE_BYTES if tokenizer.is_rust else _SLOW_INLINE_BYTES
        self._state = b""
        self._usual = _WorkerQueue(self, _MAX_WAITING["usual"])
        self._large = _WorkerQueue(self, _MAX_WAITING["large"], _LARGE_NICENESS)

    async def run(self, task: BodyTask[ResultT], body: bytes, served: ServedModel) -> ResultT:
        """Raises RequestRejected, Overloaded if too many bodies wait, and DeadlineExceeded."""
        if len(body) <= self._inline_bytes:
            return task.run(body, self._tokenizer, served)
        queue = self._usual if len(body) <= USUAL_BYTES else self._large
        return task.unpack(await queue.run(pack_frame("run", task.name, served.to_wire(), body)))

    async def warm_up(self) -> None:
        """Start the worker for bodies of a usual size, and scan the vocabulary, before the first body comes."""
        _ = self._tokenizer.max_chars_per_token
        await self._usual.warm_up()

    async def close(self) -> None:
        await asyncio.gather(self._usual.close(), self._large.close())

    def state(self) -> bytes:
        """What a worker reads first: the pickled tokenizer, for our own child process. Made once."""
        if not self._state:
            pickled = pickle.dumps(self._tokenizer)
            self._state = STATE_LENGTH.pack(len(pickled)) + pickled
        return self._state


class _Job:
    """A frame for a worker, and a future for its reply."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.reply: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    def settle(self, answer: list[Any] | TensorweaveError) -> None:
        if self.reply.done():  # nobody waits any more
            return
        if isinstance(answer, TensorweaveError):
            self.reply.set_exception(answer)
        else:
            self.reply.set_result(answer)


class _WorkerQueue:
    """One worker process, of this niceness beside the router's, and a first-in, first-out queue of bodies for it."""

    def __init__(self, pool: BodyPool, max_waiting: int, niceness: int = 0) -> None:
        self._niceness = niceness
        self._pool = pool
        self._max_waiting = max_waiting
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._running: asyncio.Task[None] | None = None
        self._worker: _Worker | None = None

    async def run(self, frame: bytes) -> list[Any]:
        """The fields of the worker's result. If the caller is cancelled, its job is skipped or, if it has begun, its
        result is dropped."""
        if self._waiting.qsize() >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} request bodies wait to be read, which is this server's limit")
        job = _Job(frame)
        self._waiting.put_nowait(job)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._work())
        try:
            return await job.reply
        finally:
            job.reply.cancel()

    async def warm_up(self) -> None:
        if self._worker is None:
            self._worker = await _Worker.start(self._pool.state(), self._niceness)

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        while not self._waiting.empty():
            self._waiting.get_nowait().settle(_closed())
        await self._end_worker()

    async def _work(self) -> None:
        """Run jobs until the queue is empty."""
        while not self._waiting.empty():
            job = self._waiting.get_nowait()
            try:
                if not job.reply.done():
                    job.settle(await self._answer(job.frame))
            finally:
                job.settle(_closed())  # if this task is cancelled

    async def _answer(self, frame: bytes) -> list[Any] | TensorweaveError:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._ask(frame)
        except TimeoutError:
            await self._end_worker()
            return DeadlineExceeded(f"the request's body was not read within {_TIMEOUT_S:g} s")
        except OSError as error:
            logger.error("no worker process for request bodies can be started: %s", error)
            return NotReady("the request's body cannot be read now")
        except TensorweaveError as error:
            return error

    async def _ask(self, frame: bytes) -> list[Any]:
        """The worker's answer. If the worker dies and the body is not the cause, the next worker's."""
        for _ in range(_MAX_TRIES):
            await self.warm_up()
            assert self._worker is not None
            answer = await self._worker.ask(frame)
            if answer is None:
                cause = await self._end_worker()
                if cause == -signal.SIGXCPU:
                    raise BodyTooCostly(f"reading the request's body took more than {CPU_LIMIT_S} s of processor time")
                continue
            if self._worker.is_bloated:
                await self._end_worker()
            name, _, *fields = answer
            if name == "failed":
                raise error_from_wire(fields[0])
            return fields
        raise BodyTooCostly("reading the request's body ended its worker process, probably for lack of memory")

    async def _end_worker(self) -> int | None:
        worker, self._worker = self._worker, None
        return None if worker is None else await worker.end()


def _closed() -> NotReady:
    return NotReady("the service is shutting down")


class _Worker:
    """The process; it answers one frame at a time."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._sink = process.stdin
        self._frames = FrameReader(process.stdout)
        self._growth_bytes = 0
        self._has_closed = False

    @classmethod
    async def start(cls, state: bytes, niceness: int) -> _Worker:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tensorweave.router.bodies.worker",
            str(niceness),
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to this process; the worker ends with its input
        )
        worker = cls(process)
        worker._sink.write(state)
        return worker

    @property
    def is_bloated(self) -> bool:
        return self._growth_bytes > _GROWTH_BYTES

    async def ask(self, frame: bytes) -> Frame | None:
        """Return None if the process died."""
        with contextlib.suppress(ConnectionError):  # it has ended; reading shows that too
            self._sink.write(frame)
            await self._sink.drain()
        answer = await anext(self._frames, None)
        if answer is None:
            self._has_closed = True
        else:
            self._growth_bytes = answer[1]
        return answer

    async def end(self) -> int:
        """End the process and return its exit status. If it has closed its output it is already ending, and the status
        says why; otherwise it is killed."""
        if self._has_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_TIMEOUT_S):
                    return await self._process.wait()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        return await self._process.wait()
