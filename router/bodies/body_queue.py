"""`BodyQueue`: bodies that wait for one of a few worker processes, first in, first out."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Final

from tensorweave.cluster.errors import (
    DeadlineExceeded,
    NotReady,
    Overloaded,
    RequestRejected,
    TensorweaveError,
    error_from_wire,
)
from tensorweave.router.bodies.worker import CPU_LIMIT_S
from tensorweave.router.bodies.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

StartWorker = Callable[[], Awaitable[WorkerProcess]]

_TIMEOUT_S: Final = 120.0
"""For one body. A worker that does not answer for so long within its limit of processor time is stopped or starved."""
_MAX_TRIES: Final = 2


class BodyTooCostly(RequestRejected):
    """Reading the body took more than a worker may take."""

    code = "body_too_costly"


class BodyQueue:
    """`start_worker` raises OSError. All but the first worker start when a body waits for them, and take none before
    they can read it."""

    def __init__(self, start_worker: StartWorker, max_waiting: int, num_workers: int = 1) -> None:
        self._max_waiting = max_waiting
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._readers = [_Reader(self._waiting, start_worker) for _ in range(num_workers)]

    async def run(self, frame: bytes) -> list[Any]:
        """The fields of the worker's result. If the caller is cancelled, its job is skipped or, if it has begun, its
        result is dropped. Raises Overloaded if too many bodies wait, and what `BodyPool.run` says."""
        if self._waiting.qsize() >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} request bodies wait to be read, which is this server's limit")
        job = _Job(frame)
        self._waiting.put_nowait(job)
        idle = next((reader for reader in self._readers if not reader.is_working), None)
        if idle is not None:
            idle.start()
        try:
            return await job.reply
        finally:
            job.reply.cancel()

    async def warm_up(self) -> None:
        """Start the first worker. Raises OSError."""
        await self._readers[0].warm_up()

    async def close(self) -> None:
        await asyncio.gather(*(reader.stop() for reader in self._readers))
        while not self._waiting.empty():
            self._waiting.get_nowait().settle(_closed())
        for reader in self._readers:
            reader.end_worker()


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


class _Reader:
    """One worker process, and the task that hands it bodies."""

    def __init__(self, waiting: asyncio.Queue[_Job], start_worker: StartWorker) -> None:
        self._waiting = waiting
        self._start_worker = start_worker
        self._running: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self.worker: WorkerProcess | None = None

    @property
    def is_working(self) -> bool:
        return self._running is not None and not self._running.done()

    def start(self) -> None:
        self._running = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def warm_up(self) -> None:
        async with self._starting:
            if self.worker is None:
                self.worker = await self._start_worker()

    def end_worker(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.close()

    async def _work(self) -> None:
        """Run jobs until the queue is empty."""
        while not self._waiting.empty():
            error = await self._start_error()
            if self._waiting.empty():
                return
            job = self._waiting.get_nowait()
            try:
                if not job.reply.done():
                    job.settle(error or await self._answer(job.frame))
            finally:
                job.settle(_closed())  # if this task is cancelled

    async def _start_error(self) -> NotReady | None:
        """None once there is a worker."""
        try:
            await self.warm_up()
        except OSError as error:
            logger.error("no worker process for request bodies can be started: %s", error)
            return NotReady("the request's body cannot be read now")
        return None

    async def _answer(self, frame: bytes) -> list[Any] | TensorweaveError:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._ask(frame)
        except TimeoutError:
            self.end_worker()
            return DeadlineExceeded(f"the request's body was not read within {_TIMEOUT_S:g} s")
        except TensorweaveError as error:
            return error

    async def _ask(self, frame: bytes) -> list[Any]:
        """The worker's answer. If the worker dies and the body is not the cause, the next worker's."""
        for _ in range(_MAX_TRIES):
            if (start_error := await self._start_error()) is not None:
                raise start_error
            assert self.worker is not None
            worker = self.worker
            answer = await worker.ask(frame)
            if answer is None:
                self.end_worker()
                if worker.status == -signal.SIGXCPU:
                    raise BodyTooCostly(f"reading the request's body took more than {CPU_LIMIT_S} s of processor time")
                continue
            if worker.is_spent:
                self.end_worker()
            name, _, *fields = answer
            if name == "failed":
                raise error_from_wire(fields[0])
            return fields
        raise BodyTooCostly("reading the request's body ended its worker process, probably for lack of memory")


def _closed() -> NotReady:
    return NotReady("the service is shutting down")
