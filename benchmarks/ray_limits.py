"""What Ray itself takes for many gangs, without any code of ours: actors started per second, their memory, and calls.

    python benchmarks/ray_limits.py --actors 20

Starts a Ray of its own on this machine, with tokens for its processes. An actor is what a rank is before it imports
anything.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any, Final

import psutil
import ray

from tensorweave.cli.arguments import positive, rate
from tensorweave.cli.figures import publish, report, settings_of
from tensorweave.cluster.ray_session import start_or_join_ray

_PATIENCE_S: Final = 110.0
_GAUGES: Final = {f"a_gauge_of_a_rank_{i}": float(i) for i in range(28)}


class Empty:
    def beat(self) -> dict[str, float]:
        return dict(_GAUGES)

    def memory(self) -> tuple[int, int]:
        """Resident, and of that what no other process shares."""
        full = psutil.Process().memory_full_info()
        return full.rss, full.uss


class Asker:
    """As the supervisor does: asks each of them once a second, from one event loop."""

    async def ask(self, actors: list[Any], seconds: float) -> tuple[float, int, float]:
        counts = [0] * len(actors)
        end_s = time.monotonic() + seconds

        async def beat(number: int) -> None:
            while time.monotonic() < end_s:
                await actors[number].beat.remote()
                counts[number] += 1

        began_s, began_cpu_s = time.monotonic(), time.process_time()
        await asyncio.gather(*(beat(number) for number in range(len(actors))))
        took_s = time.monotonic() - began_s
        return took_s, sum(counts), time.process_time() - began_cpu_s


def _start(count: int) -> tuple[list[Any], float]:
    began_s = time.monotonic()
    actors = [ray.remote(Empty).options(num_cpus=0.001).remote() for _ in range(count)]
    ray.get([actor.beat.remote() for actor in actors], timeout=_PATIENCE_S)
    return actors, time.monotonic() - began_s


def _ray_processes() -> dict[str, int]:
    """Resident MiB of the processes that a Ray without actors has, by name."""
    sizes: dict[str, int] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = process.name().split("/")[-1][:24]
            sizes[name] = sizes.get(name, 0) + (process.memory_info().rss >> 20)
        except psutil.NoSuchProcess:
            continue
    return sizes


def measure(args: argparse.Namespace) -> dict[str, Any]:
    _, first_s = _start(1)
    bare = _ray_processes()
    began_cpu_s = sum(psutil.cpu_times()[:3])
    actors, took_s = _start(args.actors)
    start_cpu_s = sum(psutil.cpu_times()[:3]) - began_cpu_s
    memory = ray.get([actor.memory.remote() for actor in actors], timeout=_PATIENCE_S)
    began_s = time.monotonic()
    for _ in range(args.calls):
        ray.get(actors[0].beat.remote(), timeout=_PATIENCE_S)
    one_by_one_s = time.monotonic() - began_s
    began_s = time.monotonic()
    ray.get([actors[0].beat.remote() for _ in range(args.calls)], timeout=_PATIENCE_S)
    together_s = time.monotonic() - began_s
    asker = ray.remote(Asker).options(num_cpus=0.001).remote()
    asked_s, num_asked, asker_cpu_s = ray.get(asker.ask.remote(actors, args.hold_s), timeout=_PATIENCE_S)
    return {
        "first_actor_s": round(first_s, 2),
        "actors_per_s": round(args.actors / took_s, 2),
        "cpu_s_per_actor": round(start_cpu_s / args.actors, 2),
        "actor_rss_mib": statistics.median(rss for rss, _ in memory) / 2**20,
        "actor_uss_mib": statistics.median(uss for _, uss in memory) / 2**20,
        "calls_per_s_one_by_one": round(args.calls / one_by_one_s),
        "calls_per_s_together": round(args.calls / together_s),
        "asker_calls_per_s": round(num_asked / asked_s),
        "asker_cpu_us_per_call": round(asker_cpu_s / num_asked * 1e6),
        "ray_mib": bare,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=positive, default=20)
    parser.add_argument("--calls", type=positive, default=2000)
    parser.add_argument("--hold-s", type=rate, default=5.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with start_or_join_ray("local"):
        figures = measure(args)
    publish(report("ray_limits", settings_of(args), figures), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
