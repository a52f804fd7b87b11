"""What guides that are made to take long cost the streams beside them: the gaps between the streams' events.

    tensorweave serve --config deploy/examples/laptop_aggregated.yaml &
    python benchmarks/hostile_guides.py --url http://127.0.0.1:8000 --served-name smollm2-135m-instruct --rank PID

Eight streams run from beginning to end. Windows in which they run alone and windows in which a process of its own sends
guides of one kind, two a second and none twice, take turns, so that both see the same machine. The first kinds are the
first guides that the service gets at all: those have one window. Prints a line of JSON per kind: the gaps `alone` and
`beside` the guides, how many are over twice the usual one (the median alone in the same turn), and, of the rank's
process if it is named, how long its threads ran and waited for a core, per second (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import functools
import http.client
import json
import multiprocessing
import os
import statistics
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 120.0
Gap = tuple[float, float]
"""When a gap ended, by `time.time`, and how long it was, in seconds."""
Told = tuple[int, float, str]
"""The status of an answer, seconds until it came, and its error's message."""


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def wide(number: int) -> dict[str, Any]:
    """Within the limits of size, but with many ways to read each text."""
    return {"type": "object", "properties": {f"f{number}_{i}": {"pattern": f"^(.*)*{i}$"} for i in range(300)}}


def small(number: int) -> dict[str, Any]:
    names = {f"name_{number}": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}}
    return {"type": "object", "properties": names, "required": list(names), "additionalProperties": False}


GUIDES: dict[str, Callable[[int], dict[str, Any]]] = {
    "first of xgrammar": lambda n: {"guided_json": small(n)},
    "first of llguidance": lambda n: {"guided_json": {"type": "number", "multipleOf": 7 + n}},
    "small schemas": lambda n: {"guided_json": small(1000 + n)},
    "multiples": lambda n: {"guided_json": {"type": "number", "multipleOf": 1000 + n}},
    "1 MB": lambda n: {"guided_json": {"enum": [f"{n} " + "x" * 1000] * 1000}},
    "1,000 deep": lambda n: {"guided_json": f'{{"title":"{n}","items":{nested(1000)}}}'},
    "60 deep": lambda n: {"guided_json": f'{{"title":"{n}","items":{nested(60)}}}'},
    "6,000 values": lambda n: {"guided_json": {"enum": [f"{n}_{i}" for i in range(6000)]}},
    "many readings": lambda n: {"guided_regex": f"{n}" + "".join(f"(.*)*{letter}" for letter in "opqrstuvwxyz")},
    "wide repetitions": lambda n: {"guided_regex": f"({n}[a-z]{{1,99}}){{1,60}}"},
    "large classes": lambda n: {"guided_regex": f"{n}" + "(\\W|\\w|é){1,2000}"},
    "readings in a schema": lambda n: {"guided_json": wide(n)},
    "grammar": lambda n: {"guided_grammar": 'root ::= a a a a a\na ::= "" | "x" a | a a "y"\nb ::= "' + f'{n}"'},
}
ONCE = {"first of xgrammar", "first of llguidance"}


def send_guides(
    url: str, name: str, kind: str, first_number: int, until_s: float, pause_s: float, answers: Any
) -> None:
    """At a low priority: the client's own processor time is not what is measured."""
    os.nice(10)
    address = urllib.parse.urlsplit(url)
    number = first_number
    while time.time() < until_s and not (number > first_number and kind in ONCE):
        number += 1
        body = json.dumps({"model": name, "prompt": "x", "max_tokens": 4, **GUIDES[kind](number)})
        began_s = time.time()
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        message = "" if answer.status == 200 else json.loads(text)["error"]["message"]
        answers.put((answer.status, time.time() - began_s, message))
        time.sleep(max(0.0, began_s + pause_s - time.time()))
    answers.put(None)


class Streams:
    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self.gaps: list[Gap] = []

    async def run(self, num_streams: int) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S, base_url=self._url) as client:
            await asyncio.gather(*[self._stream(client, place) for place in range(num_streams)])

    async def _stream(self, client: httpx.AsyncClient, place: int) -> None:
        fields = {"max_tokens": 1500, "stream": True, "ignore_eos": True, "temperature": 1, "seed": place}
        while True:
            body = {"model": self._name, "prompt": f"Stream {place}:", **fields}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                last_s = None
                async for line in answer.aiter_lines():
                    if not line:
                        continue
                    now_s = time.time()
                    if last_s is not None:
                        self.gaps.append((now_s, now_s - last_s))
                    last_s = now_s


class RankThreads:
    """Processor time of the rank's threads, and for how long they waited for a core, in seconds since the start."""

    def __init__(self, pid: int | None) -> None:
        self._tasks = None if pid is None else Path(f"/proc/{pid}/task")

    def times(self) -> tuple[float, float]:
        if self._tasks is None:
            return 0.0, 0.0
        each = [(task / "schedstat").read_text().split() for task in self._tasks.iterdir()]
        return sum(int(ran) for ran, _, _ in each) / 1e9, sum(int(waited) for _, waited, _ in each) / 1e9


@dataclass
class Window:
    """What the streams saw in one window."""

    gaps_s: list[float]
    seconds: float
    ran_s: float
    waited_s: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.gaps_s)


class Windows:
    def __init__(self, streams: Streams, threads: RankThreads) -> None:
        self._streams = streams
        self._threads = threads

    async def during(self, wait: Callable[[], Awaitable[object]]) -> Window:
        began_s, (ran_s, waited_s) = time.time(), self._threads.times()
        await wait()
        seconds, (ran_now_s, waited_now_s) = time.time() - began_s, self._threads.times()
        gaps_s = [gap_s for ended_s, gap_s in self._streams.gaps if ended_s > began_s]
        return Window(gaps_s, seconds, ran_now_s - ran_s, waited_now_s - waited_s)


async def measure(args: argparse.Namespace) -> None:
    streams = Streams(args.url, args.served_name)
    running = asyncio.create_task(streams.run(args.streams))
    windows = Windows(streams, RankThreads(args.rank))
    await asyncio.sleep(args.seconds)  # the streams have begun, and the engine is warm
    for kind in args.kinds or GUIDES:
        alone, beside, told = [], [], []
        for turn in range(1 if kind in ONCE else args.rounds):
            alone.append(await windows.during(functools.partial(asyncio.sleep, args.seconds)))
            beside.append(await windows.during(lambda: send_beside(args, kind, turn, told)))  # noqa: B023 (awaited here)
            assert not running.done(), running.exception()
        print(json.dumps({"kind": kind, **figures(alone, beside), **summary(told)}), flush=True)
    running.cancel()


async def send_beside(args: argparse.Namespace, kind: str, turn: int, told: list[Told]) -> None:
    answers: Any = multiprocessing.Queue()
    until_s = time.time() + args.seconds
    client = multiprocessing.Process(
        target=send_guides,
        args=(args.url, args.served_name, kind, 10_000 * turn, until_s, args.pause, answers),
    )
    client.start()
    while (answer := await asyncio.to_thread(answers.get, True, 2 * TIMEOUT_S)) is not None:
        told.append(answer)
    await asyncio.sleep(max(0.0, until_s - time.time()))


def figures(alone: list[Window], beside: list[Window]) -> dict[str, Any]:
    """Each turn's gaps are compared with its own median alone: streams become slower as they become longer."""
    limits_s = [2 * window.median_s for window in alone]
    return {"alone": _side(alone, limits_s), "beside": _side(beside, limits_s)}


def _side(windows: list[Window], limits_s: list[float]) -> dict[str, Any]:
    ordered_s = sorted(gap_s for window in windows for gap_s in window.gaps_s)
    seconds = sum(window.seconds for window in windows)
    over = [sum(gap_s > limit_s for gap_s in window.gaps_s) for window, limit_s in zip(windows, limits_s, strict=True)]
    return {
        "median_ms": _ms(statistics.median(ordered_s)),
        "p99_ms": _ms(ordered_s[int(0.99 * (len(ordered_s) - 1))]),
        "worst_ms": _ms(ordered_s[-1]),
        "events": len(ordered_s),
        "over_twice": sum(over),
        "ran_per_s": round(sum(window.ran_s for window in windows) / seconds, 3),
        "waited_per_s": round(sum(window.waited_s for window in windows) / seconds, 3),
    }


def summary(told: list[Told]) -> dict[str, Any]:
    return {
        "answers": dict(collections.Counter(str(status) for status, _, _ in told)),
        "longest_answer_s": round(max(seconds for _, seconds, _ in told), 2),
        "example": told[-1][2][:120],
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--served-name", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window, with guides and alone (8)")
    parser.add_argument("--rounds", type=int, default=2, help="windows of each kind, but for the first guides (2)")
    parser.add_argument("--rank", type=int, help="process of the gang's rank, on this host")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds from one guide to the next (0.5)")
    parser.add_argument("--kinds", nargs="*", choices=list(GUIDES))
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
