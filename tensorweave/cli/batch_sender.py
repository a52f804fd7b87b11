"""`Sender`: sends one request of a batch until it is answered or refused, or until it is time to leave it.

What is temporary is tried again with growing pauses: no connection, a connection that breaks, an answer that takes too
long or cannot be decoded, 408, 425, 429, 499 and 5xx.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import httpx

from tensorweave.cli.batch_input import BatchRequest, load_json

_JSON: Final = {"Content-Type": "application/json"}
_TEMPORARY: Final = frozenset({408, 425, 429, 499})
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 5.0
_LONGEST_RETRY_AFTER_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service has decided: an answer or a refusal."""

    status: int
    request_id: str
    body: Any

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Failure:
    """What may be otherwise the next time."""

    reason: str
    is_queue_full: bool = False
    retry_after_s: float = 0.0


class Sender:
    """Sets `stopping` when there is no use in going on; `reason` then says why. Somebody else may set it too: then
    nothing is tried again."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        retry_for_s: float,
        stopping: asyncio.Event,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._now_s = now_s
        self._retry_for_s = retry_for_s
        self._stopping = stopping
        self._last_answer_s = float("-inf")
        self.reason: str | None = None
        self.is_refused = False

    async def send(self, request: BatchRequest) -> Answer | None:
        """None: the request is left for another run."""
        began_s: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            outcome = await self._try(request)
            now_s = self._now_s()
            if isinstance(outcome, Answer):
                return self._checked(outcome, now_s)
            began_s = now_s if began_s is None else began_s
            if self._gives_up(outcome, began_s, now_s):
                return None
            await self._pause(max(pause_s * random.uniform(0.5, 1.0), outcome.retry_after_s))
            if self._stopping.is_set():
                return None
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _try(self, request: BatchRequest) -> Answer | Failure:
        try:
            response = await self._client.post(request.url, content=json.dumps(request.body), headers=_JSON)
        except httpx.RequestError as error:
            return Failure(f"{type(error).__name__} {error}".strip())
        status = response.status_code
        if status in _TEMPORARY or status >= 500:
            return Failure(f"HTTP {status}: {response.text[:200]}", status == 429, _retry_after_s(response))
        try:
            body = load_json(response.content)
        except ValueError:
            if response.is_success:
                return Failure(f"HTTP {status} without JSON: {response.text[:200]}")
            body = response.text
        return Answer(status, response.headers.get("x-request-id", ""), body)

    def _checked(self, answer: Answer, now_s: float) -> Answer | None:
        if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            self.is_refused = True
            self._stop(f"HTTP {answer.status}: the service asks for another key (--api-key)")
            return None
        self._last_answer_s = now_s
        return answer

    def _gives_up(self, failure: Failure, began_s: float, now_s: float) -> bool:
        """A full queue is waited for as long as others are answered. Any other request that fails for too long is left,
        so that the rest goes on; if nobody was answered meanwhile, the service is down."""
        since_s = max(began_s, self._last_answer_s) if failure.is_queue_full else began_s
        if now_s - since_s < self._retry_for_s:
            return False
        if self._last_answer_s < began_s:
            self._stop(f"no answer for {self._retry_for_s:g} s (--retry-for-s): {failure.reason}")
        return True

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._stopping.set()

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds alone; a date counts as none."""
    try:
        return min(max(0.0, float(response.headers.get("retry-after", 0))), _LONGEST_RETRY_AFTER_S)
    except ValueError:
        return 0.0
