"""`tensorweave soak`: mixed traffic for minutes (complete answers, cancelled answers, bad requests), while the memory
of every process of the service is measured.

Exit code 1 if an answer changed, a valid request failed, a gauge did not return to its first value, a process ended, or
the memory of one grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tensorweave.cli.arguments import add_trial
from tensorweave.cli.figures import write_figures

_EXAMPLES = """\
examples:
  tensorweave soak --config deploy/examples/laptop.yaml --minutes 20 --json out.json
  tensorweave soak --config deploy/examples/chaos.yaml --minutes 5 --set pools.decode.tensor_parallel_size=2

Memory is resident memory without what is shared, sampled every few seconds. A process has grown when the median of the
last quarter of its samples is above that of the second quarter by more than --growth MB and 3 %; the first quarter is
for warming up.
"""
_GROWTH_SHARE: Final = 0.03
_NUM_JOBS: Final = 48
_IDLE_WAIT_S: Final = 10.0
_GAUGES: Final = (
    "tensorweave_num_requests_running",
    "tensorweave_num_requests_waiting",
    "tensorweave_gang_num_requests_running",
    "tensorweave_gang_num_requests_waiting",
    "tensorweave_kv_cache_usage_perc",
    "tensorweave_kv_transfer_open_fetches",
    "tensorweave_kv_transfer_open_leases",
    "tensorweave_kv_transfer_held_blocks",
)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "soak",
        help="load a service for a long time and watch its memory",
        description="Mixed traffic with cancels and bad requests; memory, blocks and answers are watched.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_trial(parser)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=12, metavar="N", help="clients (default: %(default)s)")
    parser.add_argument("--sample", type=float, default=5.0, metavar="S", help="between looks at the memory")
    parser.add_argument("--growth", type=float, default=16.0, metavar="MB", help="that a process may grow by")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.set_defaults(run=run)


@dataclass(slots=True)
class Memory:
    """One process's samples, in MB."""

    name: str
    samples: list[float] = field(default_factory=list)

    @property
    def quarters(self) -> tuple[float, float]:
        """Medians of the second and of the last quarter."""
        quarter = max(1, len(self.samples) // 4)
        early = self.samples[quarter : 2 * quarter] or self.samples
        return statistics.median(early), statistics.median(self.samples[-quarter:])

    def has_grown(self, allowed_mb: float) -> bool:
        early, late = self.quarters
        return late - early > allowed_mb and late > early * (1 + _GROWTH_SHARE)


@dataclass(slots=True)
class SoakReport:
    minutes: float
    counts: dict[str, int] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    gauges_before: dict[str, float] = field(default_factory=dict)
    gauges_after: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def run(args: argparse.Namespace) -> int:
    from tensorweave.cli.process_tree import ProcessTree
    from tensorweave.cli.trial_load import OracleFailed
    from tensorweave.cli.trial_service import ServiceBroken, prepared_trial

    if args.minutes <= 0 or args.clients < 1:
        raise ValueError("--minutes must be above 0 and --clients at least 1")
    with prepared_trial(args.config, args.changes, args.api_key) as trial, ProcessTree() as tree:
        try:
            report = asyncio.run(_soak(args, trial, tree))
        except (ServiceBroken, OracleFailed) as problem:
            print(f"soak: {problem}", flush=True)
            return 1
    if args.json is not None:
        write_figures(args.json, json.dumps(report.to_plain(), indent=2) + "\n")
    print(format_report(report), flush=True)
    return 1 if report.problems else 0


async def _soak(args: argparse.Namespace, trial: Any, tree: Any) -> SoakReport:
    from tensorweave.cli.soak_load import SoakTraffic
    from tensorweave.cli.trial_load import record_oracle
    from tensorweave.cli.trial_requests import make_requests
    from tensorweave.cli.trial_service import TrialService

    config = trial.config
    service = TrialService(trial, tree, args.log)
    await service.start()
    try:
        await service.await_recovery((), config.limits.start_timeout_s)
        front_ends = service.front_ends(args.timeout)
        jobs = await record_oracle(front_ends, make_requests(config.model_name, _NUM_JOBS, args.seed), args.clients)
        report = SoakReport(args.minutes, gauges_before=await _idle_gauges(service))
        traffic = SoakTraffic(front_ends, jobs, config.model_name, args.seed)
        running = asyncio.create_task(traffic.run(args.clients))
        memory = await _watch(service, running, args.minutes * 60, args.sample)
        traffic.stop()
        await running
        report.gauges_after = await _idle_gauges(service, report.gauges_before)
    finally:
        await service.end()
    _judge(report, traffic.request_counts, memory, args.growth)
    return report


async def _watch(service: Any, running: asyncio.Task[None], duration_s: float, sample_s: float) -> dict[int, Memory]:
    """Samples of every process of the service, until the time is over or the traffic has failed."""
    memory: dict[int, Memory] = {}
    end_s = time.monotonic() + duration_s
    while (left_s := end_s - time.monotonic()) > 0 and not running.done():
        service.tree.note(service.pid)
        for pid, (name, megabytes) in (await asyncio.to_thread(_sizes, service.tree)).items():
            memory.setdefault(pid, Memory(name)).samples.append(megabytes)
        await asyncio.wait({running}, timeout=min(sample_s, left_s))
    return memory


def _sizes(tree: Any) -> dict[int, tuple[str, float]]:
    import psutil

    sizes = {}
    for process in tree.living():
        try:
            line = process.cmdline()
            own = process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        sizes[process.pid] = (_short(line) or process.name(), own / 1e6)
    return sizes


def _short(line: Sequence[str]) -> str:
    """'ray::RankWorker' for a Ray actor, else the program or module."""
    if not line:
        return ""
    if line[0].startswith("ray::"):
        return line[0].split(".")[0].split(" ")[0]
    words = [Path(word).name for word in line[:4] if not word.startswith("-")]
    return " ".join(words[:2])


async def _idle_gauges(service: Any, goal: dict[str, float] | None = None) -> dict[str, float]:
    """The gauges of `/metrics` over all gangs. Waits some seconds for them to be equal to `goal`, or zero."""
    deadline_s = time.monotonic() + _IDLE_WAIT_S
    while True:
        gauges = {name: await service.count(name) for name in _GAUGES}
        is_back = gauges == goal if goal is not None else not any(gauges.values())
        if is_back or time.monotonic() > deadline_s:
            return gauges
        await asyncio.sleep(0.25)


def _judge(report: SoakReport, request_counts: Any, memory: dict[int, Memory], growth_mb: float) -> None:
    counted = ("num_requests", "num_answered", "num_left", "num_refused", "num_failed", "num_changed")
    report.counts = {name.removeprefix("num_"): getattr(request_counts, name) for name in counted}
    report.problems += [f"{count} x {reason}" for reason, count in request_counts.problems.most_common()]
    for name, before in report.gauges_before.items():
        if report.gauges_after[name] != before:
            report.problems.append(f"{name} was {before:g} and is {report.gauges_after[name]:g}")
    num_samples = max((len(entry.samples) for entry in memory.values()), default=0)
    for pid, entry in sorted(memory.items()):
        early, late = entry.quarters
        report.memory.append(
            {"process": entry.name, "pid": pid, "samples": len(entry.samples), "mb": [round(early, 1), round(late, 1)]}
        )
        if len(entry.samples) < num_samples / 2:
            continue  # a short-lived process of Ray
        if entry.has_grown(growth_mb):
            report.problems.append(f"{entry.name} ({pid}) grew from {early:.0f} to {late:.0f} MB")


def format_report(report: SoakReport) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
    lines = [f"{report.minutes:g} minutes: {counts}"]
    lines += [f"  {m['mb'][0]:8.1f} -> {m['mb'][1]:8.1f} MB  {m['process']} ({m['pid']})" for m in report.memory]
    lines += [f"  PROBLEM: {problem}" for problem in report.problems] or ["  nothing leaked, nothing failed"]
    return "\n".join(lines)
