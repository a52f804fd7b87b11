"""What the supervisor and the admin port take with hundreds of gangs: the real supervisor, pools, heartbeats, status,
metrics and controller, in one process without Ray. Each gang has one simulated rank, half of them compute prompts.

    python benchmarks/control_plane.py --gangs 10 100 1000

Milliseconds are those of the processor. What Ray takes for the same calls, `benchmarks/ray_limits.py` measures.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import pickle
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from tensorweave.cli.arguments import positive, rate
from tensorweave.cli.figures import publish, report, settings_of
from tensorweave.cluster.fleet import StaticFleet
from tensorweave.cluster.gang import Gang
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.kv_links import ReadyGang
from tensorweave.cluster.pool import GangPool
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.protocol import GangAddress, KvEndpoint, KvSource, LinkMeasurement
from tensorweave.cluster.rank_places import RankPlaces
from tensorweave.cluster.rank_watch import RankWatch
from tensorweave.cluster.ranks import RankPlace, RankReport
from tensorweave.cluster.router_report import RouterReport
from tensorweave.cluster.supervisor import PoolSupervisor
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.pool_loads import PoolLoads
from tensorweave.deploy.scaling import Trends, decide
from tensorweave.router.admin.exposition import render
from tensorweave.router.admin.observer import Observer, Seen
from tensorweave.router.admin.picture import make_status
from tensorweave.router.admin.router_table import RouterTable
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.workers.fakes.fake_executor import FAKE_INFO
from tensorweave.workers.transfer.transfer_stats import TransferStats

_PATIENCE_S: Final = 300.0
_NODES: Final = {f"node-{i}": f"10.0.{i // 250}.{i % 250}" for i in range(128)}
_GAUGES: Final = {
    **dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks"), 12.0),
    **dict.fromkeys(("kv_blocks_used", "kv_blocks_cached", "num_preemptions_total", "iterations_total"), 12345.0),
    **dict.fromkeys(("computed_prompt_tokens_total", "generation_tokens_total", "step_seconds_total"), 1234567.0),
    **dict.fromkeys(("forward_seconds_total", "draft_tokens_total", "accepted_draft_tokens_total"), 123.0),
    **dict.fromkeys(("requests_not_finite_total", "grammars_cached", "grammars_refused_total"), 0.0),
    **TransferStats().gauges(),
}


class _Heartbeats:
    """A rank's actor as `RankWatch` sees it. What arrives through Ray is a new object each time."""

    def __init__(self) -> None:
        self.heartbeat = self

    async def remote(self) -> RankReport:
        return RankReport(0.01, is_alive=True, num_requests=12, gauges=dict(_GAUGES), num_open_files=60)


class _SimulatedGang(Gang):
    """A gang that has started. Its links are measured in `measure_s`."""

    measure_s = 0.0

    async def start(self) -> GangAddress:
        node_id = list(_NODES)[hash(self.gang_id) % len(_NODES)]
        self._places = RankPlaces([RankPlace(node_id, 4242, 0.0)], _NODES)
        self._watch = RankWatch([_Heartbeats()], self._places.name, self.spec.hang_timeout_s)  # type: ignore[list-item]
        host, info = _NODES[node_id], dataclasses.replace(FAKE_INFO)
        source = KvSource(self.gang_id, (KvEndpoint(host, 1, 0, 8),), {"model": "m", "dtype": "bfloat16"}, "s" * 32)
        return GangAddress(self.gang_id, self.epoch, self.spec.role, host, 4000, "s" * 32, info, source)

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        await asyncio.sleep(self.measure_s)
        return LinkMeasurement(5e9, 2e-5, transport="nccl")

    async def kill(self) -> None:
        pass

    async def _ask_leader(self, method: str, *arguments: Any, timeout_s: float = 5.0) -> Any:
        await asyncio.sleep(0)


class _Supervisor(PoolSupervisor):
    """In this process, with simulated gangs."""

    async def _take_over(self) -> dict[str, dict[int, ReadyGang]]:
        return {}

    def _make_pool(self, spec: PoolSpec) -> GangPool:
        def launch(gang: GangSpec, slot: int, epoch: int) -> Gang:
            return _SimulatedGang(gang, object, f"{spec.name}-{slot}.{epoch}-abcdef", epoch)

        return GangPool(spec, launch, self._publish, adapters=self._adapters)


class _Clock:
    """Processor time of this process since the last look."""

    def __init__(self) -> None:
        self._began_s = time.process_time()

    def ms(self) -> float:
        now_s = time.process_time()
        took_s, self._began_s = now_s - self._began_s, now_s
        return round(took_s * 1e3, 2)


async def _best_ms(work: Callable[[], Awaitable[Any]]) -> float:
    best_ms = float("inf")
    for _ in range(3):
        clock = _Clock()
        await work()
        best_ms = min(best_ms, clock.ms())
    return best_ms


def _now(function: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
    async def work() -> Any:
        return function()

    return work


def _rss_kib() -> int:
    return int(psutil.Process().memory_info().rss) >> 10


async def _start(num_gangs: int) -> tuple[_Supervisor, dict[str, float]]:
    """Until every gang is ready; then until every link is measured."""
    before_kib, clock = _rss_kib(), _Clock()
    pools = [
        PoolSpec("prefill", GangSpec("prefill"), num_gangs // 2),
        PoolSpec("decode", GangSpec("decode"), num_gangs - num_gangs // 2),
    ]
    supervisor = _Supervisor(pools, object)
    state = await supervisor.watch(0, 0.01)
    async with asyncio.timeout(_PATIENCE_S):
        while sum(len(pool.addresses) for pool in state.pools) < num_gangs:
            state = await supervisor.watch(state.version, 1.0)
    figures = {"start_ms": clock.ms()}
    num_links, still = 0, 0
    async with asyncio.timeout(_PATIENCE_S):
        while still < 3:
            await asyncio.sleep(0.05)
            found = len((await supervisor.watch(0, 0.0)).links)
            num_links, still = found, still + 1 if found == num_links else 0
    return supervisor, {
        **figures,
        "num_links": num_links,
        "links_ms": clock.ms(),
        "kib_per_gang": round((_rss_kib() - before_kib) / num_gangs, 1),
    }


async def _steady(num_gangs: int, hold_s: float) -> dict[str, float]:
    """Heartbeats alone."""
    clock, began_s = _Clock(), time.monotonic()
    await asyncio.sleep(hold_s)
    took_ms, took_s = clock.ms(), time.monotonic() - began_s
    return {"cores": round(took_ms / 1e3 / took_s, 4), "heartbeat_us": round(took_ms * 1e3 / (num_gangs * took_s), 1)}


def _report(number: int) -> RouterReport:
    return RouterMetrics("model", Dispatcher(StaticFleet({}))).report(f"router-{number}")


async def _answers(supervisor: _Supervisor, num_routers: int) -> dict[str, float]:
    table, config = RouterTable(), ServeConfig.model_validate({"model": "m", "pools": _POOLS})
    for number in range(num_routers):
        table.note(_report(number))
    state = await supervisor.watch(0, 0.0)
    packed_state, packed = pickle.dumps(state), pickle.dumps(await supervisor.describe())
    observer = Observer(supervisor.describe, table)
    seen = await observer.look()

    def look() -> Awaitable[Seen]:
        observer._seen = None
        return observer.look()

    def status() -> str:
        return make_status(seen, model="m", version="1", heartbeat_limit_s=10.0).model_dump_json()

    loads = PoolLoads()

    def tick() -> object:
        return decide(
            config.scaling, loads.measure(config, seen.pools, table.latest(), time.monotonic()), 1.0, Trends()
        )

    return {
        "watch_ms": await _best_ms(lambda: supervisor.watch(0, 0.0)),
        "watch_pickle_ms": await _best_ms(_now(lambda: pickle.dumps(state))),
        "watch_unpickle_ms": await _best_ms(_now(lambda: pickle.loads(packed_state))),
        "watch_kib": len(packed_state) >> 10,
        "describe_ms": await _best_ms(supervisor.describe),
        "describe_pickle_ms": await _best_ms(_now(lambda: pickle.loads(pickle.dumps(seen.pools)))),
        "describe_kib": len(packed) >> 10,
        "look_ms": await _best_ms(look),
        "status_ms": await _best_ms(_now(status)),
        "status_kib": len(status()) >> 10,
        "metrics_ms": await _best_ms(_now(lambda: render(seen, "m"))),
        "metrics_kib": len(render(seen, "m")) >> 10,
        "tick_ms": await _best_ms(_now(tick)),
    }


_POOLS: Final[Mapping[str, Any]] = {
    "prefill": {"role": "prefill", "min_replicas": 1, "max_replicas": 2000},
    "decode": {"role": "decode", "min_replicas": 1, "max_replicas": 2000},
}


async def measure(num_gangs: int, args: argparse.Namespace) -> dict[str, float]:
    supervisor, started = await _start(num_gangs)
    steady = await _steady(num_gangs, args.hold_s)
    answers = await _answers(supervisor, args.routers)
    await supervisor._pools.stop()
    return {"gangs": num_gangs, **started, **steady, **answers}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gangs", type=positive, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--routers", type=positive, default=8)
    parser.add_argument("--hold-s", type=rate, default=5.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    rows = [asyncio.run(measure(num_gangs, args)) for num_gangs in args.gangs]
    for name in rows[0]:
        print(f"{name:20}", *(f"{row[name]:>12}" for row in rows))
    publish(report("control_plane", settings_of(args), {"rows": rows}), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
