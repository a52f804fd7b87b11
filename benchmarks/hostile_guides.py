"""What guides that are made to take long cost the streams beside them: the gaps between the streams' events.

    tensorweave serve --config deploy/examples/laptop_aggregated.yaml &
    python benchmarks/hostile_guides.py --url http://127.0.0.1:8000 --served-name smollm2-135m-instruct

Eight streams run from beginning to end. Each kind of guide is sent for some seconds by a process of its own, two guides
a second and none twice; before each kind the streams run alone, which gives their usual gap. The first kinds are
the first guides that the service gets at all. Prints a line of JSON per kind.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import http.client
import json
import multiprocessing
import os
import statistics
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import httpx

TIMEOUT_S = 120.0
Gap = tuple[float, float]
"""When a gap ended, by `time.time`, and how long it was, in seconds."""


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


def send_guides(url: str, name: str, kind: str, until_s: float, pause_s: float, answers: Any) -> None:
    """At a low priority: the client's own processor time is not what is measured."""
    os.nice(10)
    address = urllib.parse.urlsplit(url)
    number = 0
    while time.time() < until_s and not (number and kind in ONCE):
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


async def measure(args: argparse.Namespace) -> None:
    streams = Streams(args.url, args.served_name)
    running = asyncio.create_task(streams.run(args.streams))
    await asyncio.sleep(args.seconds)  # the streams have begun, and the engine is warm
    for kind in args.kinds or GUIDES:
        usual = await during(streams, args.seconds)
        answers: Any = multiprocessing.Queue()
        client = multiprocessing.Process(
            target=send_guides,
            args=(args.url, args.served_name, kind, time.time() + args.seconds, args.pause, answers),
        )
        began_s = time.time()
        client.start()
        told = []
        while (answer := await asyncio.to_thread(answers.get, True, 2 * TIMEOUT_S)) is not None:
            told.append(answer)
        beside = [gap for gap in streams.gaps if gap[0] > began_s]
        print(json.dumps({"kind": kind, **figures(usual, beside), **summary(told)}), flush=True)
        assert not running.done(), running.exception()
    running.cancel()


async def during(streams: Streams, seconds: float) -> list[Gap]:
    began_s = time.time()
    await asyncio.sleep(seconds)
    return [gap for gap in streams.gaps if gap[0] > began_s]


def figures(usual: list[Gap], beside: list[Gap]) -> dict[str, Any]:
    usual_s, beside_s = sorted(gap for _, gap in usual), sorted(gap for _, gap in beside)
    median_s = statistics.median(usual_s)
    return {
        "usual_ms": _spread(usual_s),
        "beside_ms": _spread(beside_s),
        "events": len(beside_s),
        "over_twice_usual": sum(gap > 2 * median_s for gap in beside_s),
        "over_twice_when_alone": sum(gap > 2 * median_s for gap in usual_s),
    }


def summary(told: list[tuple[int, float, str]]) -> dict[str, Any]:
    return {
        "answers": dict(collections.Counter(str(status) for status, _, _ in told)),
        "longest_answer_s": round(max(seconds for _, seconds, _ in told), 2),
        "example": told[-1][2][:120],
    }


def _spread(ordered_s: list[float]) -> dict[str, float]:
    p99_s = ordered_s[int(0.99 * (len(ordered_s) - 1))]
    return {"median": _ms(statistics.median(ordered_s)), "p99": _ms(p99_s), "worst": _ms(ordered_s[-1])}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--served-name", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="that each kind is sent, and that the streams run alone"
    )
    parser.add_argument("--pause", type=float, default=0.5, help="seconds from one guide to the next (0.5)")
    parser.add_argument("--kinds", nargs="*", choices=list(GUIDES))
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
