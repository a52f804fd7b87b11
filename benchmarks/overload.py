"""Overload of a running service: what it answers at its peak, at a multiple of that for a while, and right after.

    python benchmarks/overload.py --url http://127.0.0.1:8000 --ttft-limit 4 --pids 123 456

The peak is measured first, with as many requests at a time as `--concurrency`. Then requests are sent at `--factor`
times that rate, whatever is answered. Exit code 1 if goodput (answers in time) falls below 90 % of the peak, the 99th
percentile of the time to the first token exceeds `--ttft-limit`, the memory of a process (`--pids`) grows by more than
64 MiB, or the load of half the peak afterwards is not answered as before.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from tensorweave.cli.figures import distribution, publish, report, settings_of
from tensorweave.cli.http_stream import Connection, RequestFailed

_MOST_GROWTH_BYTES: Final = 64 * 2**20
_SAMPLE_S: Final = 1.0
_PAUSE_S: Final = 0.5  # after a refusal, while the peak is measured


@dataclass(slots=True)
class Phase:
    """What came of the requests of one phase."""

    duration_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def figures(self, ttft_limit_s: float) -> dict[str, Any]:
        in_time = sum(ttft_s <= ttft_limit_s for ttft_s in self.ttft_s)
        return {
            "answered": len(self.ttft_s),
            "refused": len(self.refused_s),
            "errors": len(self.errors),
            "goodput_per_s": round(in_time / self.duration_s, 3),
            "ttft_s": {name: distribution(self.ttft_s).get(name) for name in ("median", "p90", "p99", "max")},
            "refusal_s": {name: distribution(self.refused_s).get(name) for name in ("median", "p99", "max")},
        }


class Client:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._draw = random.Random(args.seed)

    async def ask(self, phase: Phase) -> bool:
        """Return whether it was answered."""
        body = {
            "model": self._args.model,
            "prompt": self._draw.choices(range(100, 16_000), k=self._args.prompt_len),
            "max_tokens": self._args.output_len,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        connection, began_s = Connection(self._args.url, self._args.api_key), time.perf_counter()
        try:
            phase.ttft_s.append((await connection.stream("/v1/completions", body)).ttft_s)
        except RequestFailed as error:
            if error.kind == "HTTP 429":
                phase.refused_s.append(time.perf_counter() - began_s)
            else:
                phase.errors.append(str(error))
            return False
        finally:
            connection.close()
        return True


async def closed_loop(client: Client, concurrency: int, duration_s: float) -> Phase:
    """So many requests at a time. The rate counts until the last answer."""
    phase, began_s = Phase(), time.perf_counter()

    async def work() -> None:
        while time.perf_counter() - began_s < duration_s:
            if not await client.ask(phase):
                await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    phase.duration_s = time.perf_counter() - began_s
    return phase


async def open_loop(client: Client, rate_per_s: float, duration_s: float) -> Phase:
    """So many requests per second, evenly. Answers count that come while it lasts, or after it."""
    phase, began_s, tasks = Phase(), time.perf_counter(), []
    for number in range(int(rate_per_s * duration_s)):
        await asyncio.sleep(began_s + number / rate_per_s - time.perf_counter())
        tasks.append(asyncio.create_task(client.ask(phase)))
    await asyncio.gather(*tasks)
    phase.duration_s = time.perf_counter() - began_s
    return phase


async def with_memory(pids: Sequence[int], run: Awaitable[Phase]) -> tuple[Phase, dict[str, dict[str, float]]]:
    """The phase, and of each process the resident memory in MiB: at first, at most, at the end."""
    samples: dict[int, list[float]] = {pid: [] for pid in pids}

    async def sample() -> None:
        while True:
            for pid in [pid for pid in samples if psutil.pid_exists(pid)]:
                samples[pid].append(psutil.Process(pid).memory_info().rss / 2**20)
            await asyncio.sleep(_SAMPLE_S)

    sampling = asyncio.create_task(sample())
    try:
        phase = await run
    finally:
        sampling.cancel()
    shown = {str(pid): {"first": own[0], "most": max(own), "last": own[-1]} for pid, own in samples.items() if own}
    return phase, shown


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    client = Client(args)
    await closed_loop(client, args.concurrency, args.peak_s / 3)  # warms up, and fills what grows once
    peak = await closed_loop(client, args.concurrency, args.peak_s)
    rate_per_s = len(peak.ttft_s) / peak.duration_s
    before = await open_loop(client, rate_per_s / 2, args.after_s)
    over, memory = await with_memory(args.pids, open_loop(client, rate_per_s * args.factor, args.overload_s))
    after = await open_loop(client, rate_per_s / 2, args.after_s)
    phases = {"peak": peak, "half_before": before, "overload": over, "half_after": after}
    return {name: phase.figures(args.ttft_limit) for name, phase in phases.items()} | {"memory_mib": memory}


def problems(figures: dict[str, Any], ttft_limit_s: float) -> list[str]:
    over, peak, before, after = (figures[name] for name in ("overload", "peak", "half_before", "half_after"))
    wrong = []
    if over["goodput_per_s"] < 0.9 * peak["goodput_per_s"]:
        wrong.append(f"goodput {over['goodput_per_s']} is below 90 % of the peak {peak['goodput_per_s']}")
    if over["ttft_s"]["p99"] is None or over["ttft_s"]["p99"] > ttft_limit_s:
        wrong.append(f"the p99 of the time to the first token is {over['ttft_s']['p99']} s")
    if sum(figures[name]["errors"] for name in ("peak", "half_before", "overload", "half_after")):
        wrong.append("requests failed")
    if after["refused"] > before["refused"]:
        wrong.append(f"{after['refused']} requests were refused after the overload")
    for pid, own in figures["memory_mib"].items():
        if (own["most"] - own["first"]) * 2**20 > _MOST_GROWTH_BYTES:
            wrong.append(f"process {pid} grew from {own['first']:.0f} to {own['most']:.0f} MiB")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--api-key")
    parser.add_argument("--pids", type=int, nargs="*", default=[])
    parser.add_argument("--ttft-limit", type=float, default=4.0)
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--peak-s", type=float, default=20.0)
    parser.add_argument("--overload-s", type=float, default=60.0)
    parser.add_argument("--after-s", type=float, default=10.0)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = asyncio.run(measure(args))
    publish(report("overload", settings_of(args), figures), args.json)
    wrong = problems(figures, args.ttft_limit)
    print("\n".join(wrong) or "goodput, first tokens and memory hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
