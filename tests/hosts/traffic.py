"""Clients that ask a service for greedy answers without a pause, and what they see of its faults."""

from __future__ import annotations

import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

REQUEST_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Seen:
    """What all clients have seen so far. A wait is the time between two events of a stream, or until the first one."""

    num_requests: int = 0
    longest_wait_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def describe(self) -> str:
        kinds: dict[str, int] = {}
        for failure in self.failures:
            kinds[failure] = kinds.get(failure, 0) + 1
        each = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return (
            f"{self.num_requests} requests, {len(self.failures)} failed{f' ({each})' if each else ''}, "
            f"longest wait {self.longest_wait_s:.1f} s"
        )


class Traffic:
    """`urls` are the endpoints' own (…/v1); a client whose endpoint does not answer at all asks the next one. Every
    answer is compared with that of an undisturbed request for the same prompt, which the constructor makes."""

    def __init__(
        self,
        *urls: str,
        model: str,
        clients: int = 4,
        max_tokens: int = 48,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._urls = urls
        self._verify = verify
        self._bodies = [
            {
                "model": model,
                "prompt": f"Number {number}: " + "the quick brown fox jumps over the lazy dog, " * (1 + 2 * number),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            for number in range(clients)
        ]
        self._expected = [
            self._ask(httpx.Client(timeout=REQUEST_TIMEOUT_S, verify=verify), urls[0], body, Seen())
            for body in self._bodies
        ]
        self.seen = Seen()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(REQUEST_TIMEOUT_S)

    def stop_asking(self) -> None:
        """Requests that are running go on to their end."""
        self._is_over.set()

    def await_requests(self, count: int, timeout_s: float = 300.0) -> None:
        """Until so many more have ended, whatever their end."""
        goal, end_s = self.seen.num_requests + count, time.monotonic() + timeout_s
        while self.seen.num_requests < goal:
            assert time.monotonic() < end_s, f"{count} more requests have not ended: {self.seen.describe()}"
            time.sleep(0.2)

    def _run(self, number: int) -> None:
        mine, turn = Seen(), 0
        with httpx.Client(timeout=REQUEST_TIMEOUT_S, verify=self._verify) as client:
            while not self._is_over.is_set():
                failure = None
                try:
                    text = self._ask(client, self._urls[turn % len(self._urls)], self._bodies[number], mine)
                    failure = None if text == self._expected[number] else "another text"
                except httpx.ConnectError as error:
                    failure = f"no connection: {error}"
                    turn += 1
                except (httpx.HTTPError, Refused) as error:
                    failure = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.seen.num_requests += 1
                    self.seen.longest_wait_s = max(self.seen.longest_wait_s, mine.longest_wait_s)
                    if failure is not None:
                        self.seen.failures.append(failure)
                if failure is not None:
                    self._is_over.wait(0.5)

    def _ask(self, client: httpx.Client, url: str, body: dict[str, Any], seen: Seen) -> str:
        text, last_s, finish = "", time.monotonic(), None
        with client.stream("POST", f"{url}/completions", json=body) as response:
            if response.status_code != 200:
                raise Refused(f"{response.status_code} {response.read().decode()[:300]}")
            for line in response.iter_lines():
                now_s = time.monotonic()
                seen.longest_wait_s, last_s = max(seen.longest_wait_s, now_s - last_s), now_s
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Refused(f"in a stream: {json.dumps(event['error'])[:300]}")
                    text += event["choices"][0]["text"]
                    finish = event["choices"][0]["finish_reason"] or finish
        if finish != "length":
            raise Refused(f"ended as {finish!r}")
        return text


class Refused(Exception):
    """An answer that is an error."""
