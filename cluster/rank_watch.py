"""`RankWatch`: the heartbeats of a gang's ranks, and the moment when they say that the gang must end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from tensorweave.cluster.memory_kills import says_memory
from tensorweave.cluster.ranks import RankReport

T = TypeVar("T")

HEARTBEAT_INTERVAL_S: Final = 1.0
HEARTBEAT_TIMEOUT_S: Final = 4.0
STARTING_HEARTBEAT_TIMEOUT_S: Final = 30.0
"""Importing and loading may hold a rank's interpreter for seconds."""
_BEAT_S: Final = 0.25


class RankWatch:
    """Used once. `reports` has the last of each rank that has given one; `mute` are those that stopped answering;
    `on_report` is called with every report."""

    def __init__(
        self,
        actors: Sequence[ActorHandle[Any]],
        name: Callable[[int], str],
        hang_timeout_s: float,
        on_report: Callable[[int, RankReport], None] = lambda rank, report: None,
    ) -> None:
        self.reports: dict[int, RankReport] = {}
        self.mute: set[int] = set()
        self._actors = actors
        self._name = name
        self._hang_timeout_s = hang_timeout_s
        self._on_report = on_report

    def report(self, rank: int) -> RankReport:
        return self.reports.get(rank, RankReport())

    async def until_fault(self, timeout_s: float = HEARTBEAT_TIMEOUT_S) -> str:
        """Returns when the gang must end, and says why: at most about 5 s, or the hang timeout, after the fault."""
        watchers = [asyncio.create_task(self._watch_rank(rank, timeout_s)) for rank in range(len(self._actors))]
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            return "; ".join(watcher.result() for watcher in done)
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _watch_rank(self, rank: int, timeout_s: float) -> str:
        """Standstill is a fault when two reports in a row say so."""
        name = self._name(rank)
        was_still = False
        while True:
            try:
                report: RankReport = await in_time(self._actors[rank].heartbeat.remote(), timeout_s)
            except TimeoutError:
                self.mute.add(rank)
                return f"{name} has not answered for {timeout_s:g} s"
            except RayError as error:
                return f"{name} died: {why_dead(error)}"
            self.reports[rank] = report
            self._on_report(rank, report)
            standstill = report.standstill(self._hang_timeout_s)
            if fault := report.fault or (was_still and standstill):
                return f"{name}: {fault}"
            was_still = standstill is not None
            await asyncio.sleep(_BEAT_S if was_still else HEARTBEAT_INTERVAL_S)


async def in_time(reference: Awaitable[T], timeout_s: float) -> T:
    """Its result, or TimeoutError. Counts beats in vain, not seconds: if our own loop stood still, nobody else is
    to blame."""
    asked = asyncio.ensure_future(reference)
    try:
        for _ in range(round(timeout_s / _BEAT_S)):
            done, _ = await asyncio.wait({asked}, timeout=_BEAT_S)
            if done:
                return asked.result()
        raise TimeoutError
    finally:
        asked.cancel()


def why_dead(error: RayError) -> str:
    return "its host ran out of memory, and Ray killed it" if says_memory(error) else first_line(error).rstrip(".")


def first_line(error: BaseException) -> str:
    """Of what an actor raised, its own words: Ray's text for it begins with the call and ends with a traceback."""
    text = str(error.cause if isinstance(error, RayTaskError) else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
