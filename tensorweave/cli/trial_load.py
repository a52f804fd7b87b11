"""The load on a service under trial: clients that repeat a set of jobs, and what became of each request.

The oracle is one undisturbed run of all jobs; an answer is right when its text, finish reason and token counts are
the oracle's.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tensorweave.cli.http_stream import Connection, RequestFailed, Timeline
from tensorweave.cli.trial_jobs import Answer, Job, answer_of, with_stop_string

_STOP_EVERY: Final = 4
_MAX_ASKS: Final = 6
_ASK_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a service's front ends listen, and what its clients bring along."""

    urls: Sequence[str]
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)

    def connect(self, url: str) -> Connection:
        return Connection(url, self.api_key, self.timeout_s)


@dataclass(slots=True)
class Outcome:
    """One request's way: `progress_s` are the moments at which its client held more of the answer than before."""

    job: Job
    sent_s: float
    progress_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    answer: Answer | None = None
    failure: str | None = None
    num_asks: int = 0

    @property
    def is_changed(self) -> bool:
        return self.answer is not None and self.job.answer is not None and self.answer != self.job.answer

    @property
    def is_midway(self) -> bool:
        """Its client holds some of the answer, and not its end."""
        return bool(self.progress_s) and self.ended_s is None

    def was_open(self, at_s: float) -> bool:
        return self.sent_s <= at_s and (self.ended_s is None or self.ended_s > at_s)

    def longest_silence_s(self, since_s: float) -> float:
        """The longest that its client waited for more, or for a failure, counted from `since_s`."""
        ends = [] if self.ended_s is None else [self.ended_s]
        marks = [since_s, *(mark for mark in (*self.progress_s, *ends) if mark > since_s)]
        return max((late - early for early, late in itertools.pairwise(marks)), default=0.0)


class _Transcript(Timeline):
    """A timeline that notes, and tells, when it got longer than `num_known` characters, or ended."""

    def __init__(self, num_known: int, progress_s: list[float], on_progress: Callable[[], None]) -> None:
        super().__init__(0.0)
        self._num_known = num_known
        self._progress_s = progress_s
        self._on_progress = on_progress

    def add(self, event: dict[str, Any], now_s: float) -> None:
        was_finished = self.is_finished
        super().add(event, now_s)
        if len(self.text) > self._num_known or self.is_finished != was_finished:
            self._num_known = len(self.text)
            self._progress_s.append(now_s)
            self._on_progress()


class Load:
    """Clients on one service's doors. `round_id` begins every request id, so that none is used twice."""

    def __init__(self, doors: Doors, round_id: str, *, asks_again: bool = False) -> None:
        self.outcomes: list[Outcome] = []
        self._doors = doors
        self._round_id = round_id
        self._asks_again = asks_again
        self._is_stopping = False
        self._has_ended = asyncio.Event()
        self._has_moved = asyncio.Event()
        self._may_ask = asyncio.Event()
        self._may_ask.set()

    async def run_once(self, jobs: Sequence[Job], num_clients: int) -> list[Outcome]:
        """Every job once."""
        waiting = collections.deque(jobs)
        await self._run_clients(waiting, num_clients, is_endless=False)
        return self.outcomes

    async def run(self, jobs: Sequence[Job], num_clients: int) -> None:
        """Jobs in turn until `stop`; returns when the last answers have ended."""
        await self._run_clients(collections.deque(jobs), num_clients, is_endless=True)

    def stop(self) -> None:
        """No new requests."""
        self._is_stopping = True
        self._may_ask.set()

    def hold(self) -> None:
        """No new requests until `go_on`."""
        self._may_ask.clear()

    def go_on(self) -> None:
        self._may_ask.set()

    @property
    def num_midway(self) -> int:
        return sum(outcome.is_midway for outcome in self.outcomes)

    async def until_midway(self, count: int) -> None:
        """Returns when at least `count` requests are in the midst of their answers."""
        while self.num_midway < count:
            self._has_moved.clear()
            await self._has_moved.wait()

    async def until_heard(self) -> None:
        """Returns when every request sent has begun to be answered, or has ended."""
        while any(not outcome.progress_s and outcome.ended_s is None for outcome in self.outcomes):
            self._has_moved.clear()
            await self._has_moved.wait()

    async def until_closed(self, at_s: float) -> None:
        """Returns when every request that was open at `at_s` has ended."""
        while any(outcome.was_open(at_s) and outcome.ended_s is None for outcome in self.outcomes):
            self._has_ended.clear()
            await self._has_ended.wait()

    async def _run_clients(self, waiting: collections.deque[Job], num_clients: int, *, is_endless: bool) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._client(number, waiting, is_endless))

    async def _client(self, number: int, waiting: collections.deque[Job], is_endless: bool) -> None:
        doors = [self._doors.connect(url) for url in self._doors.urls]
        door = number % len(doors)
        try:
            while waiting and await self._is_open():
                job = waiting.popleft()
                if is_endless:
                    waiting.append(job)
                door = await self._ask(job, doors, door)
        finally:
            for connection in doors:
                connection.close()

    async def _is_open(self) -> bool:
        await self._may_ask.wait()
        return not self._is_stopping

    async def _ask(self, job: Job, doors: Sequence[Connection], door: int) -> int:
        """One request to its end; returns the door that answered."""
        outcome = Outcome(job, time.perf_counter())
        request_id = f"{self._round_id}-{len(self.outcomes)}"
        self.outcomes.append(outcome)
        body, num_known = job.body_as(request_id), 0
        while True:
            transcript = _Transcript(num_known, outcome.progress_s, self._has_moved.set)
            outcome.num_asks += 1
            try:
                await doors[door].stream(job.path, body, request_id=request_id, timeline=transcript)
                outcome.answer = answer_of(transcript)
                break
            except RequestFailed as failure:
                is_broken = failure.kind in ("connection", "cut short")
                if not (is_broken and self._asks_again and outcome.num_asks < _MAX_ASKS):
                    outcome.failure = str(failure)
                    break
                num_known = max(num_known, len(transcript.text))
                door = (door + 1) % len(doors)
                await asyncio.sleep(_ASK_PAUSE_S * (outcome.num_asks - 1))
        outcome.ended_s = time.perf_counter()
        self._has_ended.set()
        self._has_moved.set()
        return door


class OracleFailed(Exception):
    """The undisturbed run had failures: there is nothing to compare with."""


async def record_oracle(doors: Doors, jobs: Sequence[Job], num_clients: int) -> list[Job]:
    """The jobs with their fault-free answers. Every fourth gets a stop string that its own answer holds.

    Raises:
        OracleFailed: a request failed although nothing was disturbed.
    """
    known = await _answered(doors, jobs, num_clients, "oracle")
    stopping = [with_stop_string(job) for job in known[::_STOP_EVERY]]
    known[::_STOP_EVERY] = await _answered(doors, stopping, num_clients, "oracle-stop")
    return known


async def _answered(doors: Doors, jobs: Sequence[Job], num_clients: int, round_id: str) -> list[Job]:
    load = Load(doors, round_id)
    outcomes = await load.run_once(jobs, num_clients)
    if failures := [outcome.failure for outcome in outcomes if outcome.failure is not None]:
        raise OracleFailed(f"{len(failures)} requests failed in the undisturbed run, the first: {failures[0]}")
    found = {id(outcome.job): outcome.answer for outcome in outcomes}
    return [replace(job, answer=found[id(job)]) for job in jobs]
