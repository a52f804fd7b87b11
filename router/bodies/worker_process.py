"""`WorkerProcess`: a child that reads request bodies (`router/bodies/worker.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from typing import Final

from tensorweave.cluster.priority import lower_priority
from tensorweave.cluster.wire import Frame, FrameReader

_GROWTH_BYTES: Final = 128 << 20
"""A worker whose peak memory has grown by so much is replaced, because it may not return that memory."""
_START_TIMEOUT_S: Final = 120.0
"""Two seconds of imports, on a machine that is busy."""
_EXIT_TIMEOUT_S: Final = 5.0


class WorkerProcess:
    """It answers one frame at a time."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._sink = process.stdin
        self._frames = FrameReader(process.stdout)
        self._growth_bytes = 0
        self._has_closed = False

    @classmethod
    async def start(cls, state: bytes, niceness: int) -> WorkerProcess:
        """Return it once it can read bodies, from when on it has this niceness: before, the first body would wait for a
        minute beside step loops. Raises OSError if it does not come up."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tensorweave.router.bodies.worker",
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to this process; the worker ends with its input
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                ready = await worker.ask(state)
        except TimeoutError:
            await worker.end()
            raise OSError(f"a worker process for request bodies was not ready within {_START_TIMEOUT_S:g} s") from None
        except BaseException:  # cancelled, say
            worker._kill()
            raise
        if ready is None:
            status = await worker.end()
            raise OSError(f"a worker process for request bodies ended with status {status} as it started")
        lower_priority(process.pid, niceness)
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

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
        self._kill()
        return await self._process.wait()

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
