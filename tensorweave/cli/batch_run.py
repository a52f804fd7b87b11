"""`run_batch`: all open lines of a batch, a bounded number at a time, each into one of two files."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx
from tqdm import tqdm

from tensorweave.cli.batch_input import BadLine, Line
from tensorweave.cli.batch_output import ResultFile, answer_line, bad_line
from tensorweave.cli.batch_sender import Sender

_CONNECT_TIMEOUT_S: Final = 10.0
_BAR_S: Final = 0.5
_BAR_IN_A_LOG_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """`timeout_s` is the longest answer; the service may be away for `retry_for_s`."""

    headers: dict[str, str]
    concurrency: int
    timeout_s: float
    retry_for_s: float


@dataclass(slots=True)
class Counts:
    """Lines of the input by what has become of them, in this run and those before."""

    total: int
    answered: int
    errors: int

    @property
    def left(self) -> int:
        return self.total - self.answered - self.errors


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a run has stopped before its last line; a `reason` of None means that it has not."""

    reason: str | None
    is_refused: bool = False


class BatchRun:
    """The workers of one run; `lines` are those that are not done."""

    def __init__(self, sender: Sender, stopping: asyncio.Event, lines: Iterator[Line], counts: Counts) -> None:
        self._sender = sender
        self._stopping = stopping
        self._lines = lines
        self._counts = counts

    async def work(self, output: ResultFile, errors: ResultFile, bar: tqdm[Any]) -> None:
        while not self._stopping.is_set() and (line := next(self._lines, None)) is not None:
            is_answered = False
            if isinstance(line, BadLine):
                await errors.append(bad_line(line))
            elif (answer := await self._sender.send(line)) is None:
                continue
            else:
                is_answered = answer.is_success
                written = answer_line(line, answer.status, answer.request_id, answer.body)
                await (output if is_answered else errors).append(written)
            self._counts.answered += is_answered
            self._counts.errors += not is_answered
            bar.set_postfix(errors=self._counts.errors, refresh=False)
            bar.update()


async def run_batch(
    url: str, settings: BatchSettings, lines: Iterator[Line], counts: Counts, output: ResultFile, errors: ResultFile
) -> Ending:
    """Update `counts`. The first SIGINT or SIGTERM lets running requests finish, the second cancels them."""
    stopping, tasks = asyncio.Event(), set[asyncio.Task[None]]()
    timeout = httpx.Timeout(settings.timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None)
    limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
    with _stopping_on_signals(stopping, tasks), _bar(counts) as bar:
        async with httpx.AsyncClient(base_url=url, headers=settings.headers, timeout=timeout, limits=limits) as client:
            sender = Sender(client, settings.retry_for_s, stopping)
            run = BatchRun(sender, stopping, lines, counts)
            await _all_of(tasks, settings.concurrency, lambda: run.work(output, errors, bar))
    return Ending(sender.reason or ("stopped by a signal" if stopping.is_set() else None), sender.is_refused)


async def _all_of(tasks: set[asyncio.Task[None]], count: int, work: Callable[[], Any]) -> None:
    """Run so many at once. The first error ends them all, and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks.update(group.create_task(work()) for _ in range(count))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


@contextlib.contextmanager
def _stopping_on_signals(stopping: asyncio.Event, tasks: set[asyncio.Task[None]]) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            for task in tasks:
                task.cancel()
        else:
            tqdm.write("tensorweave: stopping once the running requests have ended", file=sys.stderr)
            stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _bar(counts: Counts) -> tqdm[Any]:
    period_s = _BAR_S if sys.stderr.isatty() else _BAR_IN_A_LOG_S
    done = counts.total - counts.left
    return tqdm(total=counts.total, initial=done, unit=" lines", file=sys.stderr, mininterval=period_s, maxinterval=600)
