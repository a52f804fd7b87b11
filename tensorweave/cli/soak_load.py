"""The traffic of `tensorweave soak`: complete answers that are compared, answers that are cancelled, and bad
requests."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tensorweave.cli.arguments import bearer
from tensorweave.cli.http_stream import Connection, RequestFailed, Timeline
from tensorweave.cli.trial_load import FrontEnds
from tensorweave.cli.trial_requests import TrialRequest, answer_of

_CANCEL_SHARE: Final = 0.25
_BAD_SHARE: Final = 0.15
"""Shares of all requests; the others are read to their end."""
_MAX_CANCEL_DELAY_S: Final = 1.5
_REASONS_KEPT: Final = 20

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A request, and the status that it must get. `body` is JSON, or raw bytes."""

    path: str
    body: dict[str, Any] | bytes
    status: int


def bad_requests(model: str) -> list[BadRequest]:
    """One request for each kind of mistake."""
    wrong: list[dict[str, Any]] = [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [2**31 - 1]},
        {"prompt": [-1]},
        {"prompt": "x", "max_tokens": 10**7},
        {"prompt": "x", "n": 0},
        {"prompt": "x", "n": 10**6},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "top_p": 2},
        {"prompt": "x", "stop": 3},
        {"prompt": "x", "max_tokens": "many"},
        {"prompt": "x", "logit_bias": {"99999999": 1}},
        {"prompt": "x", "colour": "red"},
        {"prompt": [1] * 100_000},
    ]
    return [
        *(BadRequest(COMPLETIONS, {"model": model, **fields}, 400) for fields in wrong),
        BadRequest(COMPLETIONS, {"model": "another", "prompt": "x"}, 404),
        BadRequest(CHAT, {"model": model, "messages": []}, 400),
        BadRequest(CHAT, {"model": model, "messages": [{"role": "king", "content": "x"}]}, 400),
        BadRequest(COMPLETIONS, b'{"model": ', 400),
        BadRequest(COMPLETIONS, b'{"model": "\xff\xfe"}', 400),
        BadRequest("/v1/nothing", {"model": model}, 404),
    ]


@dataclass(slots=True)
class TrafficCounts:
    """The outcomes of all requests. `problems` are those that no client has caused."""

    num_answered: int = 0
    num_left: int = 0
    num_refused: int = 0
    num_failed: int = 0
    num_changed: int = 0
    problems: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def num_requests(self) -> int:
        return self.num_answered + self.num_left + self.num_refused + self.num_failed

    def fail(self, reason: str) -> None:
        self.num_failed += 1
        if reason in self.problems or len(self.problems) < _REASONS_KEPT:
            self.problems[reason] += 1


class SoakTraffic:
    """Clients that send randomly drawn requests until `stop`."""

    def __init__(self, front_ends: FrontEnds, jobs: Sequence[TrialRequest], model: str, seed: int) -> None:
        self.request_counts = TrafficCounts()
        self._doors = front_ends
        self._jobs = jobs
        self._bad = bad_requests(model)
        self._seed = seed
        self._is_stopping = False
        self._numbers = 0

    def stop(self) -> None:
        self._is_stopping = True

    async def run(self, num_clients: int) -> None:
        """Run until `stop`, and return when the last answers have ended."""
        headers, timeout_s = bearer(self._doors.api_key), self._doors.timeout_s
        async with httpx.AsyncClient(headers=headers, timeout=timeout_s) as http, asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._client(number, http))

    async def _client(self, number: int, http: httpx.AsyncClient) -> None:
        draws = random.Random(self._seed * 1000 + number)
        url = self._doors.urls[number % len(self._doors.urls)]
        connection = self._doors.connect(url)
        try:
            while not self._is_stopping:
                kind = draws.random()
                if kind < _BAD_SHARE:
                    await self._send_bad(draws.choice(self._bad), url, http)
                elif kind < _BAD_SHARE + _CANCEL_SHARE:
                    await self._cancel_answer(
                        draws.choice(self._jobs), connection, draws.uniform(0.0, _MAX_CANCEL_DELAY_S)
                    )
                else:
                    await self._read_answer(draws.choice(self._jobs), connection)
        finally:
            connection.close()

    async def _read_answer(self, job: TrialRequest, connection: Connection) -> None:
        try:
            timeline = await connection.stream(job.path, job.body_as(self._name()))
        except RequestFailed as failure:
            self.request_counts.fail(str(failure))
            return
        self.request_counts.num_answered += 1
        if job.answer is not None and answer_of(timeline) != job.answer:
            self.request_counts.num_changed += 1
            self.request_counts.problems["an answer that is not the undisturbed one"] += 1

    async def _cancel_answer(self, job: TrialRequest, connection: Connection, delay_s: float) -> None:
        timeline = Timeline(time.perf_counter())
        try:
            async with asyncio.timeout(delay_s):
                await connection.stream(job.path, job.body_as(self._name()), timeline=timeline)
            self.request_counts.num_answered += 1
        except TimeoutError:
            connection.close()
            self.request_counts.num_left += 1
        except RequestFailed as failure:
            self.request_counts.fail(str(failure))

    async def _send_bad(self, wrong: BadRequest, url: str, http: httpx.AsyncClient) -> None:
        try:
            if isinstance(wrong.body, bytes):
                headers = {"content-type": "application/json"}
                answer = await http.post(url + wrong.path, content=wrong.body, headers=headers)
            else:
                answer = await http.post(url + wrong.path, json=wrong.body)
            message = answer.json()["error"]["message"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as problem:
            self.request_counts.fail(
                f"a bad request was not refused properly: {type(problem).__name__}: {str(wrong.body)[:60]}"
            )
            return
        if answer.status_code != wrong.status or not message:
            self.request_counts.fail(f"{answer.status_code} in place of {wrong.status} for {str(wrong.body)[:60]}")
        else:
            self.request_counts.num_refused += 1

    def _name(self) -> str:
        self._numbers += 1
        return f"soak-{self._seed}-{self._numbers}"
