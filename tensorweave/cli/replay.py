"""`tensorweave replay`: a trace of requests against a running service, or, with `--simulate`, through the router's,
the schedulers' and the KV cache managers' own code on a stepped clock."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Final, get_args

from tensorweave.cli.arguments import add_api_key, add_changes, positive, rate
from tensorweave.cli.figures import aligned, machine, publish, report, settings_of
from tensorweave.cli.goodput_load import LatencyLimits
from tensorweave.cli.replay_figures import replay_figures
from tensorweave.cli.replay_http import replay_over_http
from tensorweave.cli.replay_trace import Trace
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.deploy.config_file import read_document
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.policy import PolicyName
from tensorweave.workers.fakes.stepped_loop import run_stepped

_POLICIES: Final[tuple[PolicyName, ...]] = get_args(PolicyName)
_EXAMPLES = """\
examples:
  tensorweave replay --trace mooncake.jsonl --url http://127.0.0.1:8000 --num-requests 200 --shrink 32
  tensorweave replay --calibrate smollm2 --cost-model cost.json --set dtype=float32
  tensorweave replay --trace mooncake.jsonl --simulate --cost-model cost.json --gangs 64 --policy all --json out.json

The trace has Mooncake's format. A simulation's gangs are of role 'both', each with KV blocks of the trace's size.
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="replay a trace of requests, against a service or simulated",
        description="Replay a trace of requests and report latencies, goodput and prefix hits.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, metavar="FILE", help="one JSON object per line")
    what.add_argument("--calibrate", metavar="MODEL", help="measure an engine and write --cost-model instead")
    parser.add_argument("--num-requests", type=positive, metavar="N", help="only the first (default: all)")
    parser.add_argument("--speed", type=rate, default=1.0, metavar="X", help="times as fast (default: %(default)s)")
    parser.add_argument("--shrink", type=positive, default=1, metavar="N", help="divide all lengths by it, up to 512")
    parser.add_argument("--ttft-limit", type=rate, default=2.0, metavar="S", help="of goodput (default: %(default)s)")
    parser.add_argument("--itl-limit", type=rate, default=0.05, metavar="S", help="of goodput (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    service = parser.add_argument_group("against a service")
    service.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    service.add_argument("--model", default="smollm2", help="the model's name there (default: %(default)s)")
    service.add_argument("--vocab-size", type=positive, default=16_000, metavar="N", help="default: %(default)s")
    service.add_argument("--timeout", type=rate, default=600.0, metavar="S", help="default: %(default)s")
    add_api_key(parser)
    _add_simulation(parser)
    parser.set_defaults(run=run)


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("simulated")
    group.add_argument("--simulate", action="store_true")
    group.add_argument("--cost-model", type=Path, metavar="FILE", help="seconds of a step, from --calibrate")
    group.add_argument("--gangs", type=positive, default=4, metavar="N", help="default: %(default)s")
    group.add_argument("--policy", choices=[*_POLICIES, "all"], default="joint", help="default: %(default)s")
    group.add_argument("--kv-tokens", type=positive, default=420_000, metavar="N", help="per gang (%(default)s)")
    group.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="for the scheduler (%(default)s)")
    group.add_argument("--max-batch-size", type=positive, metavar="N", help="default: the engine's on that device")
    group.add_argument("--max-num-tokens", type=positive, metavar="N", help="default: the engine's on that device")
    group.add_argument("--router-ms", type=rate, default=5.0, metavar="MS", help="per request (default: %(default)s)")
    group.add_argument("--max-inflight", type=positive, default=100_000, metavar="N", help="default: %(default)s")
    group.add_argument("--max-ttft", type=rate, metavar="S", help="limits.max_ttft_s (default: none)")
    add_changes(parser, "an argument of the engine that --calibrate measures")


def run(args: argparse.Namespace) -> int:
    if args.calibrate is not None:
        return _calibrate(args)
    if args.shrink > 512:
        raise ValueError("--shrink is at most 512, the tokens of a block")
    trace = Trace.read(args.trace, limit=args.num_requests, speed=args.speed, shrink=args.shrink)
    rows = _simulate(trace, args) if args.simulate else [_replay(trace, args)]
    publish(report("replay", settings_of(args), {"runs": rows}), args.json)
    print(_table(rows))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from tensorweave.cli.replay_calibration import calibrate, write_cost_model  # imports torch

    if args.cost_model is None:
        raise ValueError("--calibrate needs --cost-model, the file to write")
    options = read_document(os.devnull, args.changes).checked().data
    cost, error = calibrate(args.calibrate, options)
    about = {"model": args.calibrate, "options": options, "fit": error, "machine": machine()}
    write_cost_model(args.cost_model, cost, about)
    figures = {"cost": {name: f"{number:.3e}" for name, number in dataclasses.asdict(cost).items()}, "fit": error}
    publish(report("calibrate", settings_of(args), figures), args.json)
    return 0


def _simulate(trace: Trace, args: argparse.Namespace) -> list[dict[str, Any]]:
    from tensorweave.cli.replay_calibration import read_cost_model  # imports torch
    from tensorweave.cli.replay_simulation import Simulation
    from tensorweave.workers.fakes.simulated_gang import GangShape

    if args.cost_model is None:
        raise ValueError("--simulate needs --cost-model: see --calibrate")
    cost = read_cost_model(args.cost_model)
    num_blocks = max(1, args.kv_tokens // trace.block_tokens)
    engine = TorchLlmArgs(model="simulated", max_batch_size=args.max_batch_size, max_num_tokens=args.max_num_tokens)
    shape = GangShape(num_blocks, trace.block_tokens, StepSettings.of(engine, args.device))
    limits = Limits(max_inflight=args.max_inflight, max_queued=100_000, max_ttft_s=args.max_ttft)
    rows = []
    for policy in _POLICIES if args.policy == "all" else (args.policy,):
        began_s = time.perf_counter()
        simulation = Simulation(trace, args.gangs, shape, cost, policy, limits, args.router_ms / 1e3)
        outcomes, duration_s = run_stepped(simulation.run())
        figures = replay_figures(trace, outcomes, duration_s, LatencyLimits(args.ttft_limit, args.itl_limit))
        busy = round(simulation.busy_s / duration_s / args.gangs, 4)
        took_s = round(time.perf_counter() - began_s, 1)
        rows.append({"policy": policy, "gangs": args.gangs, **figures, "busy": busy, "took_s": took_s})
    return rows


def _replay(trace: Trace, args: argparse.Namespace) -> dict[str, Any]:
    asking = replay_over_http(trace, args.url, args.model, args.vocab_size, args.api_key, args.timeout)
    outcomes, duration_s = asyncio.run(asking)
    figures = replay_figures(trace, outcomes, duration_s, LatencyLimits(args.ttft_limit, args.itl_limit))
    return {"policy": "the service's", **figures}


def _table(rows: list[dict[str, Any]]) -> str:
    head = ("policy", "answered", "TTFT median", "p90", "p99", "ITL mean", "good", "good/s", "hits", "ideal")
    return aligned([head, *(_cells(row) for row in rows)], num_left=1)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ttft, itl = row["ttft_s"], row["itl_s"]
    times = [f"{ttft[name]:.3f}" if ttft else "–" for name in ("median", "p90", "p99")]
    mean = f"{itl['mean'] * 1e3:.1f} ms" if itl else "–"
    shares = [f"{row[name]:.1%}" for name in ("hit_rate", "ideal_hit_rate")]
    good = (f"{row['good_share']:.1%}", f"{row['goodput_per_s']:.3f}")
    return (row["policy"], str(row["num_answered"]), *times, mean, *good, *shares)
