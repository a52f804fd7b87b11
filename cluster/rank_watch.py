"""`RankWatch`: asks a gang's ranks for heartbeats, and detects when the gang must end."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from tensorweave.cluster.memory_kills import is_memory_kill
from tensorweave.cluster.ranks import RankReport

T = TypeVar("T")

HEARTBEAT_INTERVAL_S: Final = 1.0
HEARTBEAT_TIMEOUT_S: Final = 4.0
STARTING_HEARTBEAT_TIMEOUT_S: Final = 30.0
"""Importing and loading may block a rank's interpreter for seconds."""
_CHECK_INTERVAL_S: Final = 0.25
_IN_CREATION: Final = "an error raised in its creation task"
_HOST: Final = re.compile(r"\bip=([0-9a-fA-F.:]+)")


class RankWatch:
    """Used once. `unresponsive` are the ranks that stopped answering. `on_report` is called with every report."""

    def __init__(
        self,
        actors: Sequence[ActorHandle[Any]],
        name: Callable[[int], str],
        hang_timeout_s: float,
        on_report: Callable[[int, RankReport], None] = lambda rank, report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reports: dict[int, RankReport] = {}
        self.unresponsive: set[int] = set()
        self._actors = actors
        self._name = name
        self._hang_timeout_s = hang_timeout_s
        self._on_report = on_report
        self._clock = clock

    def report(self, rank: int) -> RankReport:
        """The rank's last report. Of a rank that waits for another pipeline stage, the progress is that of the rank
        with the newest: all are stuck only where none has any."""
        report = self._reports.get(rank, RankReport())
        if not report.waits_for_stage:
            return report
        ages_s = [each.progress_age_s for each in self._reports.values() if each.progress_age_s is not None]
        return dataclasses.replace(report, progress_age_s=min(ages_s, default=None))

    async def until_fault(self) -> str:
        """Return why the gang must end, at most about 5 s, or the hang timeout, after the fault."""
        return await self._until_fault(HEARTBEAT_TIMEOUT_S, self._hang_timeout_s)

    async def until_fault_while_starting(self) -> str:
        """The same of a gang that is not ready yet. The step loop of a rank that is waits for those that are not, so
        that one without progress is no fault: whoever starts the gang bounds the time."""
        return await self._until_fault(STARTING_HEARTBEAT_TIMEOUT_S, math.inf)

    async def _until_fault(self, timeout_s: float, hang_timeout_s: float) -> str:
        watchers = [
            asyncio.create_task(self._watch_rank(rank, timeout_s, hang_timeout_s)) for rank in range(len(self._actors))
        ]
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            return "; ".join(watcher.result() for watcher in done)
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _watch_rank(self, rank: int, timeout_s: float, hang_timeout_s: float) -> str:
        """A step loop that makes no progress is a fault if two successive reports say so, `hang_timeout_s` after the
        watch began at the earliest: until then, it may have waited for the start of the other ranks."""
        name = self._name(rank)
        was_stuck, began_s = False, self._clock()
        while True:
            try:
                report: RankReport = await result_within(self._actors[rank].heartbeat.remote(), timeout_s)
            except TimeoutError:
                self.unresponsive.add(rank)
                phase = self._reports.get(rank, RankReport()).phase
                return f"{name} has not answered for {timeout_s:g} s{phase and f' (it was {phase})'}"
            except RayError as error:
                return f"{name} died: {death_reason(error)}"
            self._reports[rank] = report
            self._on_report(rank, report)
            is_new = self._clock() - began_s <= hang_timeout_s
            hang = None if is_new else self.report(rank).describe_hang(hang_timeout_s)
            if fault := report.fault or (was_stuck and hang):
                return f"{name}: {fault}"
            was_stuck = hang is not None
            await asyncio.sleep(_CHECK_INTERVAL_S if was_stuck else HEARTBEAT_INTERVAL_S)


async def result_within(reference: Awaitable[T], timeout_s: float) -> T:
    """Return the result, or raise TimeoutError. Counts intervals rather than seconds, so that a pause of our own loop
    is not taken for a silent peer."""
    future = asyncio.ensure_future(reference)
    try:
        for _ in range(round(timeout_s / _CHECK_INTERVAL_S)):
            done, _ = await asyncio.wait({future}, timeout=_CHECK_INTERVAL_S)
            if done:
                return future.result()
        raise TimeoutError
    finally:
        future.cancel()


def death_reason(error: RayError) -> str:
    return "its host ran out of memory, and Ray killed it" if is_memory_kill(error) else first_line(error).rstrip(".")


def first_line(error: BaseException) -> str:
    """The first line of an error. Of an error that an actor raised, the actor's own message is used, without the call
    and the traceback that Ray adds; of one in its creation, which Ray tells as text, the last line and the host."""
    text = str(error.cause if isinstance(error, RayTaskError) else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if _IN_CREATION in lines[0] and len(lines) > 1:
        host = _HOST.search(lines[0])
        return lines[-1][:300] + ("" if host is None else f" (on host {host[1]})")
    return lines[0][:300]
