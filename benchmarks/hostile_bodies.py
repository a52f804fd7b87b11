"""What clients that send hostile bodies cost the streams beside them: the gaps between events, with and without them.

    tensorweave serve --config deploy/examples/laptop_aggregated.yaml &
    python benchmarks/hostile_bodies.py --url http://127.0.0.1:8000 --served-name smollm2-135m-instruct

Streams run all the time; in every other run, hostile clients in processes of their own send bodies of up to 8 MB that
are made to take long. Prints one line per run, and a summary as JSON.
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
from typing import Any

import httpx

MB = 1_000_000
TIMEOUT_S = 300.0


def hostile_bodies(name: str) -> list[tuple[str, bytes]]:
    def completion(prompt: Any = "x", **fields: Any) -> tuple[str, bytes]:
        return "/v1/completions", json.dumps({"model": name, "prompt": prompt, "max_tokens": 1, **fields}).encode()

    messages = [{"role": "user", "content": "a"}] * 200_000
    return [
        completion("1" * 8 * MB),
        ("/v1/chat/completions", json.dumps({"model": name, "messages": messages}).encode()),
        completion([[]] * 2_000_000),
        completion(metadata={"x": [[]] * 2_000_000}),
        completion(stop=["a"] * 1_500_000),
        completion(logit_bias={str(index): 1 for index in range(400_000)}),
        completion([5] * 2_500_000),
        ("/tokenize", json.dumps({"prompt": "hello " * 1_300_000}).encode()),
    ]


def send_bodies(url: str, name: str, place: int, until_s: float, counts: Any) -> None:
    """One hostile client, at a low priority: its own processor time is not what is measured."""
    os.nice(10)
    address, bodies, seen = urllib.parse.urlsplit(url), hostile_bodies(name), collections.Counter[str]()
    while time.time() < until_s:
        path, body = bodies[place % len(bodies)]
        place += 1
        try:
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
            connection.request("POST", path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            seen[str(answer.status)] += 1
            connection.close()
        except OSError as error:
            seen[type(error).__name__] += 1
    counts.put(dict(seen))


class Streams:
    """Streams that run until `until_s`, and the gaps between the events of each."""

    def __init__(self, url: str, name: str, until_s: float) -> None:
        self._url = url
        self._name = name
        self._until_s = until_s
        self.gaps_s: list[float] = []
        self.health_s: list[float] = []
        self.failures: list[str] = []

    async def run(self, num_streams: int) -> None:
        limits = httpx.Limits(max_connections=num_streams + 1)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, base_url=self._url) as client:
            await asyncio.gather(
                *[self._stream(client, place) for place in range(num_streams)], self._ask_health(client)
            )

    async def _stream(self, client: httpx.AsyncClient, place: int) -> None:
        number = 0
        while time.time() < self._until_s:
            number += 1
            fields = {"max_tokens": 400, "stream": True, "ignore_eos": True, "temperature": 0}
            body = {"model": self._name, "prompt": f"Stream {place}, answer {number}:", **fields}
            last_line = ""
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                last_s = None
                async for line in answer.aiter_lines():
                    if not line:
                        continue
                    now_s, last_line = time.perf_counter(), line
                    if last_s is not None:
                        self.gaps_s.append(now_s - last_s)
                    last_s = now_s
                    if time.time() > self._until_s:
                        return
            if last_line != "data: [DONE]":
                self.failures.append(last_line[:200])

    async def _ask_health(self, client: httpx.AsyncClient) -> None:
        while time.time() < self._until_s:
            began_s = time.perf_counter()
            answer = await client.get("/health")
            self.health_s.append(time.perf_counter() - began_s)
            if answer.status_code != 200:
                self.failures.append(f"/health {answer.status_code}")
            await asyncio.sleep(0.1)


def run(args: argparse.Namespace, num_hostile: int) -> dict[str, Any]:
    until_s, counts = time.time() + args.seconds, multiprocessing.Queue()
    clients = [
        multiprocessing.Process(target=send_bodies, args=(args.url, args.served_name, place, until_s, counts))
        for place in range(num_hostile)
    ]
    for client in clients:
        client.start()
    streams = Streams(args.url, args.served_name, until_s)
    asyncio.run(streams.run(args.streams))
    answers: collections.Counter[str] = collections.Counter()
    for _ in clients:
        answers.update(counts.get(timeout=TIMEOUT_S))
    for client in clients:
        client.join()
    return {"hostile": num_hostile, **figures(streams), "answers_to_hostile": dict(answers)}


def figures(streams: Streams) -> dict[str, Any]:
    gaps_ms = sorted(round(1e3 * gap_s, 1) for gap_s in streams.gaps_s)
    return {
        "events": len(gaps_ms),
        "median_gap_ms": gaps_ms[len(gaps_ms) // 2],
        "p99_gap_ms": gaps_ms[int(0.99 * len(gaps_ms))],
        "worst_gap_ms": gaps_ms[-1],
        "worst_health_ms": round(1e3 * max(streams.health_s), 1),
        "failures": streams.failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--served-name", required=True)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--hostile", type=int, default=9, help="hostile clients at a time (9)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run (30)")
    parser.add_argument("--rounds", type=int, default=3, help="runs without and with them (3)")
    args = parser.parse_args()
    runs = []
    for _ in range(args.rounds):
        for num_hostile in (0, args.hostile):
            runs.append(run(args, num_hostile))
            print(json.dumps(runs[-1]), flush=True)
    worst = {
        kind: statistics.median(run["worst_gap_ms"] for run in runs if bool(run["hostile"]) == is_hostile)
        for kind, is_hostile in (("without", False), ("with", True))
    }
    print(json.dumps({"median_of_worst_gaps_ms": worst}))


if __name__ == "__main__":
    main()
