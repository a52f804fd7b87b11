"""The load of `tensorweave chaos`: a fixed set of streamed requests, the clients that repeat them, and the judgement.

The oracle is one undisturbed run of all jobs; an answer is right when its text, finish reason and token counts are
the oracle's.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tensorweave.cli.http_stream import Connection, RequestFailed, Timeline

_WORDS: Final = (
    *("the", "of", "and", "water", "light", "under", "every", "small", "river", "stone", "naïve", "été", "answer"),
    *("because", "tomorrow", "seven", "paper", "window", "quiet", "東京", "green", "engine", "between", "morning"),
    *("table", "😀", "bread", "letter", "without", "mountain", "never"),
)
_NUM_WORDS: Final = (1, 3, 8, 20, 50, 110)
_NUM_TOKENS: Final = (48, 400, 160, 700, 300)
_STOP_EVERY: Final = 4
_MAX_ASKS: Final = 6
_ASK_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """What must not change."""

    text: str
    finish_reason: str
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Job:
    """One request, to be asked again and again; `answer` is the oracle's. With `is_fresh` no prefix cache ever has its
    prompt, so that it is computed, and handed over, each time."""

    path: str
    body: dict[str, Any]
    is_fresh: bool = False
    answer: Answer | None = None

    def body_as(self, request_id: str) -> dict[str, Any]:
        return {**self.body, "cache_salt": request_id} if self.is_fresh else self.body


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

    def was_open(self, at_s: float) -> bool:
        return self.sent_s <= at_s and (self.ended_s is None or self.ended_s > at_s)

    def longest_silence_s(self, since_s: float) -> float:
        """The longest that its client waited for more, or for a failure, counted from `since_s`."""
        ends = [] if self.ended_s is None else [self.ended_s]
        marks = [since_s, *(mark for mark in (*self.progress_s, *ends) if mark > since_s)]
        return max((late - early for early, late in itertools.pairwise(marks)), default=0.0)


class _Transcript(Timeline):
    """A timeline that notes when it got longer than `num_known` characters, or ended."""

    def __init__(self, num_known: int, progress_s: list[float]) -> None:
        super().__init__(0.0)
        self._num_known = num_known
        self._progress_s = progress_s

    def add(self, event: dict[str, Any], now_s: float) -> None:
        was_finished = self.is_finished
        super().add(event, now_s)
        if len(self.text) > self._num_known or self.is_finished != was_finished:
            self._num_known = len(self.text)
            self._progress_s.append(now_s)


def make_jobs(model: str, count: int, seed: int) -> list[Job]:
    """Completions and chats, greedy and seeded sampling, short and long; the same for the same seed."""
    draws = random.Random(seed)
    return [_job(model, number, draws) for number in range(count)]


def _job(model: str, number: int, draws: random.Random) -> Job:
    words = [draws.choice(_WORDS) for _ in range(_NUM_WORDS[number % len(_NUM_WORDS)])]
    text = f"{number}: {' '.join(words)}"
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": _NUM_TOKENS[number % len(_NUM_TOKENS)],
        "ignore_eos": number % 7 != 0,
        "temperature": 0,
    }
    if number % 2:
        body |= {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": draws.randrange(2**31)}
    is_fresh = number % 3 != 0
    if number % 5 == 0:
        return Job("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}, is_fresh)
    return Job("/v1/completions", {**body, "prompt": text}, is_fresh)


def with_stop_string(job: Job) -> Job:
    """The same job, to be ended half-way by a stop string that is taken from its own answer, across a token's edge."""
    assert job.answer is not None
    text = job.answer.text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    return job if len(stop) < 3 or "\ufffd" in stop else replace(job, body={**job.body, "stop": [stop]})


class Load:
    """Clients on one service's doors. `round_id` begins every request id, so that none is used twice."""

    def __init__(self, urls: Sequence[str], timeout_s: float, round_id: str, *, asks_again: bool = False) -> None:
        self.outcomes: list[Outcome] = []
        self._urls = urls
        self._timeout_s = timeout_s
        self._round_id = round_id
        self._asks_again = asks_again
        self._is_stopping = False
        self._has_ended = asyncio.Event()

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
        doors = [Connection(url, timeout_s=self._timeout_s) for url in self._urls]
        door = number % len(doors)
        try:
            while waiting and not self._is_stopping:
                job = waiting.popleft()
                if is_endless:
                    waiting.append(job)
                door = await self._ask(job, doors, door)
        finally:
            for connection in doors:
                connection.close()

    async def _ask(self, job: Job, doors: Sequence[Connection], door: int) -> int:
        """One request to its end; returns the door that answered."""
        outcome = Outcome(job, time.perf_counter())
        request_id = f"{self._round_id}-{len(self.outcomes)}"
        self.outcomes.append(outcome)
        body, num_known = job.body_as(request_id), 0
        while True:
            transcript = _Transcript(num_known, outcome.progress_s)
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
        return door


def answer_of(timeline: Timeline) -> Answer:
    """Of a stream that has come to its end."""
    assert timeline.finish_reason is not None
    counts = timeline.usage
    return Answer(timeline.text, timeline.finish_reason, int(counts["prompt_tokens"]), int(counts["completion_tokens"]))


class OracleFailed(Exception):
    """The undisturbed run had failures: there is nothing to compare with."""


async def record_oracle(urls: Sequence[str], jobs: Sequence[Job], num_clients: int, timeout_s: float) -> list[Job]:
    """The jobs with their fault-free answers. Every fourth gets a stop string that its own answer holds.

    Raises:
        OracleFailed: a request failed although nothing was disturbed.
    """
    known = await _answered(urls, jobs, num_clients, timeout_s, "oracle")
    stopping = [with_stop_string(job) for job in known[::_STOP_EVERY]]
    known[::_STOP_EVERY] = await _answered(urls, stopping, num_clients, timeout_s, "oracle-stop")
    return known


async def _answered(
    urls: Sequence[str], jobs: Sequence[Job], num_clients: int, timeout_s: float, round_id: str
) -> list[Job]:
    load = Load(urls, timeout_s, round_id)
    outcomes = await load.run_once(jobs, num_clients)
    if failures := [outcome.failure for outcome in outcomes if outcome.failure is not None]:
        raise OracleFailed(f"{len(failures)} requests failed in the undisturbed run, the first: {failures[0]}")
    found = {id(outcome.job): outcome.answer for outcome in outcomes}
    return [replace(job, answer=found[id(job)]) for job in jobs]
