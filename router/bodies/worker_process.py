"""`WorkerProcess`: a process that reads request bodies; `WorkerParent`: the process from which all of them are forked
(`router/bodies/worker.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from typing import Final, Self

from tensorweave.cluster.priority import lower_priority, processor_time_s
from tensorweave.cluster.wire import Frame, FrameReader
from tensorweave.router.bodies.worker import Priority

_GROWTH_BYTES: Final = 128 << 20
"""A worker whose peak memory has grown by so much is replaced, because it may not return that memory."""
SHORT_S: Final = 0.1
"""Processor time of one body, which then goes on at a low priority: texts of 200 KB take as much."""
_LOOK_S: Final = 0.05
_START_TIMEOUT_S: Final = 120.0
"""Two seconds of imports, on a machine that is busy."""
_EXIT_TIMEOUT_S: Final = 5.0


class WorkerProcess:
    """It answers one frame at a time. A body that takes long loses the usual priority, and this its worker for ever.

    `status` is how it has ended, if that is known, as `subprocess` says it.
    """

    def __init__(self, reader: asyncio.StreamReader, sink: asyncio.StreamWriter, priority: Priority) -> None:
        self._has_usual_priority = priority is Priority.USUAL
        self._was_lowered = False
        self._frames = FrameReader(reader)
        self._sink = sink
        self._growth_bytes = 0
        self.pid = 0
        self.status: int | None = None

    @classmethod
    async def open(cls, connection: socket.socket, priority: Priority) -> Self:
        """Return it once it can read bodies. Raises OSError if it ends before that."""
        worker = cls(*await asyncio.open_connection(sock=connection), priority)
        try:
            ready = await worker._next()
        except BaseException:  # cancelled, say
            worker.close()
            raise
        if ready is None:
            worker.close()
            raise OSError("a worker process for request bodies ended as it started")
        worker.pid = ready[2]
        return worker

    @property
    def is_spent(self) -> bool:
        """It is to be replaced."""
        return self._was_lowered or self._growth_bytes > _GROWTH_BYTES

    async def ask(self, frame: bytes) -> Frame | None:
        """Return None if the process died."""
        looking = asyncio.create_task(self._lower_if_long()) if self._has_usual_priority else None
        try:
            with contextlib.suppress(ConnectionError):  # it has ended; reading shows that too
                self._sink.write(frame)
                await self._sink.drain()
            return await self._next()
        finally:
            if looking is not None:
                looking.cancel()

    def close(self) -> None:
        """End it, whatever it does."""
        self._sink.close()

    async def _lower_if_long(self) -> None:
        """While it has a body."""
        before_s = processor_time_s(self.pid)
        while before_s is not None:
            await asyncio.sleep(_LOOK_S)
            now_s = processor_time_s(self.pid)
            if now_s is None:
                return
            if now_s - before_s > SHORT_S:
                lower_priority(self.pid)
                self._was_lowered = True
                return

    async def _next(self) -> Frame | None:
        answer = await anext(self._frames, None)
        if answer is None:
            return None
        if answer[0] == "ended":
            self.status = answer[1]
            return None
        self._growth_bytes = answer[1]
        return answer


async def send_fd(control: socket.socket, message: bytes, descriptor: int) -> None:
    """Send a file descriptor over a socket that does not block, once there is room: a new process may still have to
    read what was sent before. Raises OSError."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            socket.send_fds(control, [message], [descriptor])
            return
        except BlockingIOError:
            writable = loop.create_future()
            loop.add_writer(control, writable.set_result, None)
            try:
                await writable
            finally:
                loop.remove_writer(control)


class WorkerParent:
    """Starts with the first worker, and again if it has died. `state` is what it reads first."""

    def __init__(self, state: Callable[[], bytes]) -> None:
        self._state = state
        self._starting = asyncio.Lock()
        self._process: Process | None = None
        self._control: socket.socket | None = None
        self._has_forked = False

    async def start_worker(self, priority: Priority) -> WorkerProcess:
        """Raises OSError if it does not come up."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                worker = await WorkerProcess.open(await self._fork(priority), priority)
        except TimeoutError:
            if not self._has_forked:
                await self.close()
            raise OSError(f"a worker process for request bodies was not ready within {_START_TIMEOUT_S:g} s") from None
        self._has_forked = True
        return worker

    async def close(self) -> None:
        """End it, and with it its workers."""
        control, process = self._control, self._process
        self._control, self._process, self._has_forked = None, None, False
        if control is not None:
            control.close()
        if process is None:
            return
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                await process.wait()
        except TimeoutError:  # it still imports, or is stopped
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _fork(self, priority: Priority) -> socket.socket:
        """The router's end of a new worker's socket."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                async with self._starting:
                    await self._hand_over(theirs, priority)
        except BaseException:
            ours.close()
            raise
        return ours

    async def _hand_over(self, connection: socket.socket, priority: Priority) -> None:
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):  # it has died
                await send_fd(control, priority.value, connection.fileno())
                return
        await self.close()
        control = await self._start()
        await send_fd(control, priority.value, connection.fileno())

    async def _start(self) -> socket.socket:
        """In this session, as `lower_priority` needs. It ignores Ctrl-C, and ends with its input."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        control, theirs = socket.socketpair()
        self._control = control
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tensorweave.router.bodies.worker",
                stdin=theirs.fileno(),
                env=environment,
            )
        control.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(control, self._state())
        return control
