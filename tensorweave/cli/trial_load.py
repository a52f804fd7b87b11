"""The load on a service under trial: clients that repeat a set of requests, and the outcome of each.

The oracle is one undisturbed run of all requests; an answer is correct if its text, finish reason and token counts are
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
from tensorweave.cli.trial_requests import RecordedAnswer, TrialRequest, answer_of, with_stop_string

_STOP_EVERY: Final = 4
_MAX_SENDS: Final = 6
_SEND_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class FrontEnds:
    """Where a service's front ends listen, and the timeout and key of its clients."""

    urls: Sequence[str]
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)

    def connect(self, url: str) -> Connection:
        return Connection(url, self.api_key, self.timeout_s)


@dataclass(slots=True)
class Outcome:
    """The outcome of one request. `progress_s` are the times at which its client received more of the answer."""

    job: TrialRequest
    sent_s: float
    progress_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    answer: RecordedAnswer | None = None
    failure: str | None = None
    num_sends: int = 0

    @property
    def is_changed(self) -> bool:
        return self.answer is not None and self.job.answer is not None and self.answer != self.job.answer

    @property
    def is_midway(self) -> bool:
        """Its client has received a part of the answer."""
        return bool(self.progress_s) and self.ended_s is None

    def was_open(self, at_s: float) -> bool:
        return self.sent_s <= at_s and (self.ended_s is None or self.ended_s > at_s)

    def longest_silence_s(self, since_s: float) -> float:
        """The longest that its client waited for more, or for a failure, counted from `since_s`."""
        ends = [] if self.ended_s is None else [self.ended_s]
        marks = [since_s, *(mark for mark in (*self.progress_s, *ends) if mark > since_s)]
        return max((late - early for early, late in itertools.pairwise(marks)), default=0.0)


class _ProgressTimeline(Timeline):
    """A timeline that records when its text first exceeds `num_known` characters, and each extension after that."""

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
    """Clients of one service's front ends. Every request id begins with `round_id`, so that none is used twice."""

    def __init__(self, front_ends: FrontEnds, round_id: str, *, resends: bool = False) -> None:
        self.outcomes: list[Outcome] = []
        self._doors = front_ends
        self._round_id = round_id
        self._resends = resends
        self._is_stopping = False
        self._has_ended = asyncio.Event()
        self._has_progress = asyncio.Event()
        self._may_send = asyncio.Event()
        self._may_send.set()

    async def run_once(self, jobs: Sequence[TrialRequest], num_clients: int) -> list[Outcome]:
        """Send every request once."""
        waiting = collections.deque(jobs)
        await self._run_clients(waiting, num_clients, is_endless=False)
        return self.outcomes

    async def run(self, jobs: Sequence[TrialRequest], num_clients: int) -> None:
        """Repeat the requests until `stop`; return when the last answers have ended."""
        await self._run_clients(collections.deque(jobs), num_clients, is_endless=True)

    def stop(self) -> None:
        """No new requests."""
        self._is_stopping = True
        self._may_send.set()

    def hold(self) -> None:
        """No new requests until `resume`."""
        self._may_send.clear()

    def resume(self) -> None:
        self._may_send.set()

    @property
    def num_midway(self) -> int:
        return sum(outcome.is_midway for outcome in self.outcomes)

    async def until_midway(self, count: int) -> None:
        """Wait until at least `count` requests are partly answered."""
        while self.num_midway < count:
            self._has_progress.clear()
            await self._has_progress.wait()

    async def until_answered(self) -> None:
        """Wait until every request that was sent is partly answered, or has ended."""
        while any(not outcome.progress_s and outcome.ended_s is None for outcome in self.outcomes):
            self._has_progress.clear()
            await self._has_progress.wait()

    async def until_closed(self, at_s: float) -> None:
        """Wait until every request that was open at `at_s` has ended."""
        while any(outcome.was_open(at_s) and outcome.ended_s is None for outcome in self.outcomes):
            self._has_ended.clear()
            await self._has_ended.wait()

    async def _run_clients(
        self, waiting: collections.deque[TrialRequest], num_clients: int, *, is_endless: bool
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._client(number, waiting, is_endless))

    async def _client(self, number: int, waiting: collections.deque[TrialRequest], is_endless: bool) -> None:
        front_ends = [self._doors.connect(url) for url in self._doors.urls]
        front_end = number % len(front_ends)
        try:
            while waiting and await self._is_open():
                job = waiting.popleft()
                if is_endless:
                    waiting.append(job)
                front_end = await self._send(job, front_ends, front_end)
        finally:
            for connection in front_ends:
                connection.close()

    async def _is_open(self) -> bool:
        await self._may_send.wait()
        return not self._is_stopping

    async def _send(self, job: TrialRequest, front_ends: Sequence[Connection], front_end: int) -> int:
        """Send one request and read its answer to the end; return the index of the front end that answered."""
        outcome = Outcome(job, time.perf_counter())
        request_id = f"{self._round_id}-{len(self.outcomes)}"
        self.outcomes.append(outcome)
        body, num_known = job.body_as(request_id), 0
        while True:
            timeline = _ProgressTimeline(num_known, outcome.progress_s, self._has_progress.set)
            outcome.num_sends += 1
            try:
                await front_ends[front_end].stream(job.path, body, request_id=request_id, timeline=timeline)
                outcome.answer = answer_of(timeline)
                break
            except RequestFailed as failure:
                is_broken = failure.kind in ("connection", "cut short")
                if not (is_broken and self._resends and outcome.num_sends < _MAX_SENDS):
                    outcome.failure = str(failure)
                    break
                num_known = max(num_known, len(timeline.text))
                front_end = (front_end + 1) % len(front_ends)
                await asyncio.sleep(_SEND_PAUSE_S * (outcome.num_sends - 1))
        outcome.ended_s = time.perf_counter()
        self._has_ended.set()
        self._has_progress.set()
        return front_end


class OracleFailed(Exception):
    """The undisturbed run had failures, so there is nothing to compare with."""


async def record_oracle(front_ends: FrontEnds, jobs: Sequence[TrialRequest], num_clients: int) -> list[TrialRequest]:
    """The requests with their undisturbed answers. Every fourth gets a stop string from its own answer.

    Raises:
        OracleFailed: a request failed although nothing was disturbed.
    """
    known = await _answered(front_ends, jobs, num_clients, "oracle")
    stopping = [with_stop_string(job) for job in known[::_STOP_EVERY]]
    known[::_STOP_EVERY] = await _answered(front_ends, stopping, num_clients, "oracle-stop")
    return known


async def _answered(
    front_ends: FrontEnds, jobs: Sequence[TrialRequest], num_clients: int, round_id: str
) -> list[TrialRequest]:
    load = Load(front_ends, round_id)
    outcomes = await load.run_once(jobs, num_clients)
    if failures := [outcome.failure for outcome in outcomes if outcome.failure is not None]:
        raise OracleFailed(f"{len(failures)} requests failed in the undisturbed run, the first: {failures[0]}")
    found = {id(outcome.job): outcome.answer for outcome in outcomes}
    return [replace(job, answer=found[id(job)]) for job in jobs]
