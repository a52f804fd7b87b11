"""`tensorweave bench goodput`: how many requests a second keep limits of TTFT and ITL, with prompts and answers in the
same gangs and in different ones, on the same number of ranks.

Aggregated gangs share the requests; disaggregated ones are a prefill and a decode pool; in the learnt way each gang may
do both, alone or for another one, as the joint policy decides per request, which is told the limits.

Each way is a service of its own, one after the other, under the same load at rising rates. The load is an open loop: a
request is sent when it is due and its first token counts from then, so that a slow service is not spared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

from tensorweave.cli.arguments import add_changes, positive
from tensorweave.cli.arguments import rate as above_0
from tensorweave.cli.bench_http import served_model
from tensorweave.cli.figures import publish, report, settings_of, write_figures
from tensorweave.cli.goodput_load import Due, LatencyLimits, Mix, Outcome, Row, arrivals, best_row, figures, run_load
from tensorweave.cli.goodput_plot import curves_svg
from tensorweave.cli.goodput_report import Curves, best_table, learnt_ratios, rates_table
from tensorweave.cli.http_stream import Connection, Timeline
from tensorweave.cli.own_service import service_config
from tensorweave.cli.prompts import random_prompts, vocab_size_of
from tensorweave.cluster.llm_args import gang_mesh
from tensorweave.deploy.config import ServeConfig
from tensorweave.workers.store.model_store import resolve_model

WAYS: Final = ("aggregated", "disaggregated", "learnt")
_END_S: Final = 120.0
_STOP_S: Final = 15.0
"""What the last answers of a load and the end of a service take."""
_HOPELESS: Final = 0.2


def add_goodput(kinds: Any) -> None:
    parser = kinds.add_parser(
        "goodput", help="requests per second within limits of TTFT and ITL, aggregated and disaggregated"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the service's YAML; its pools are replaced")
    parser.add_argument("--model", help="serve this model: a directory, a hub id, or smollm2")
    add_changes(parser, "change a key of the configuration, for example engine.tensor_parallel_size=2")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--gangs", type=positive, default=2, help="gangs of each way (default: %(default)s)")
    parser.add_argument("--prefill-gangs", type=positive, default=1, help="of those that are apart (default: 1)")
    parser.add_argument("--rates", nargs="+", type=above_0, default=[1.0, 2.0, 4.0, 8.0], help="requests per second")
    parser.add_argument("--duration", type=above_0, default=20.0, help="seconds at each rate (default: 20)")
    parser.add_argument("--ttft-ms", type=above_0, default=1000.0, help="limit of the first token (default: 1000)")
    parser.add_argument("--itl-ms", type=above_0, default=30.0, help="limit of 99 %% of the others (default: 30)")
    parser.add_argument("--share", type=above_0, default=0.9, help="share that must keep the limits (default: 0.9)")
    for name, length in (("chat-input", 200), ("chat-output", 128), ("long-input", 2000), ("long-output", 32)):
        parser.add_argument(f"--{name}", type=positive, default=length, help=f"tokens (default: {length})")
    parser.add_argument("--long-share", type=float, default=0.15, help="share of long prompts (default: 0.15)")
    parser.add_argument("--burst", type=positive, default=8, help="long prompts that come together (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit-s", type=above_0, default=math.inf, metavar="S",
        help="start no load that does not end in this time, of which each way has an equal share (default: no limit)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves here, as SVG")
    parser.set_defaults(run=run_goodput, url=None)


def run_goodput(args: argparse.Namespace) -> int:
    if not 0 <= args.long_share < 1:
        raise ValueError(f"--long-share {args.long_share:g} must be at least 0 and below 1")
    if args.prefill_gangs >= args.gangs and set(args.ways) != {"aggregated"}:
        raise ValueError(f"--prefill-gangs {args.prefill_gangs} must leave some of the {args.gangs} gangs to decode")
    configs = {way: way_config(args, way) for way in args.ways}
    curves: dict[str, list[Row]] = {}
    end_s = time.monotonic() + args.limit_s
    for number, (way, config) in enumerate(configs.items()):
        rows = curves[way] = []
        share_s = (end_s - time.monotonic()) / (len(configs) - number)
        for row in _measure_apart(args, config, share_s):
            rows.append(row)
            print(f"{way}: {_told(row)}", flush=True)
            _write(args, curves)
        if left_out := [rate for rate in args.rates if rate not in {row["rate"] for row in rows}]:
            print(f"{way}: no figures at {' '.join(f'{rate:g}' for rate in left_out)} requests/s", flush=True)
    publish(_report(args, curves), None)
    print(f"\n{rates_table(curves)}\n\n{best_table(curves, args.share)}")
    return 0 if all(curves.values()) else 1


def _report(args: argparse.Namespace, curves: Curves) -> dict[str, Any]:
    best = {way: best_row(rows, args.share) for way, rows in curves.items()}
    ratios = {"learnt to the better other": learnt_ratios(curves)}
    return report("goodput", settings_of(args), {"runs": curves, "best": best, **ratios})


def _write(args: argparse.Namespace, curves: Curves) -> None:
    """After every row, so that a run that is ended early leaves the figures of those before."""
    if args.json is not None:
        write_figures(args.json, json.dumps(_report(args, curves), indent=2, default=str) + "\n")
    if args.plot is not None:
        title = f"Within {args.ttft_ms:g} ms to the first token and {args.itl_ms:g} ms between tokens"
        write_figures(args.plot, curves_svg(title, curves))


def way_config(args: argparse.Namespace, way: str) -> ServeConfig:
    """The configuration of one way. Raises ValueError if it is wrong."""
    apart = {"prefill": {"replicas": args.prefill_gangs}, "decode": {"replicas": args.gangs - args.prefill_gangs}}
    together: dict[str, Any] = {"main": {"replicas": args.gangs}}
    pools = apart if way == "disaggregated" else together
    own = [f"pools={json.dumps(pools)}", f"router.policy={'joint' if way == 'learnt' else 'least_loaded'}"]
    if way == "learnt":
        own += [f"router.ttft_limit_ms={args.ttft_ms}", f"router.itl_limit_ms={args.itl_ms}"]
    config = _config_with(args, own)
    exchanges = [pool.cache_transceiver_config for pool in config.pools.values()]
    if way != "learnt" or all(exchange is not None and exchange.backend for exchange in exchanges):
        return config
    # Each gang may compute prompts for the other ones.
    return _config_with(args, [*own, "engine.cache_transceiver_config.backend=DEFAULT"])


def _config_with(args: argparse.Namespace, own: Sequence[str]) -> ServeConfig:
    return service_config(argparse.Namespace(**{**vars(args), "changes": [*args.changes, *own]}))


def num_ranks(config: ServeConfig) -> int:
    return sum(pool.replicas * gang_mesh(pool).size for pool in config.pools.values())


def _measure_apart(args: argparse.Namespace, config: ServeConfig, limit_s: float) -> Iterator[Row]:
    """In a process of its own, since a service needs a main thread, and Ray's state lasts as long as a process. It ends
    within `limit_s` and the time that its service takes to stop."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    values = {name: value for name, value in vars(args).items() if name != "run"}
    process = context.Process(target=_measure, args=(values, config, theirs, limit_s))
    end_s = time.monotonic() + limit_s
    process.start()
    theirs.close()
    try:
        while ours.poll(None if math.isinf(end_s) else max(0.0, end_s - time.monotonic())):
            try:
                row: Row = ours.recv()
            except EOFError:
                return
            yield row
        process.terminate()
    finally:
        process.join(_END_S)
        if process.is_alive():
            process.kill()
            process.join()


def _measure(values: dict[str, Any], config: ServeConfig, pipe: Pipe, limit_s: float) -> None:
    from tensorweave.deploy.service import running

    end_s = time.monotonic() + limit_s - _STOP_S
    threading.Thread(target=_end_with_parent, daemon=True).start()
    args = argparse.Namespace(**values)
    mix = Mix(args.chat_input, args.chat_output, args.long_input, args.long_output, args.long_share, args.burst)
    limits = LatencyLimits(args.ttft_ms / 1e3, args.itl_ms / 1e3)
    vocab_size = vocab_size_of(resolve_model(config.model))
    began_s = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), running(config) as url:  # a service that is late is told to end
        print(f"the service was ready after {time.monotonic() - began_s:.0f} s", flush=True)
        sender = Sender(url, served_model(url, None), vocab_size, args.seed)
        usual = sorted(args.rates)[len(args.rates) // 2]
        for number, rate in enumerate((usual, *args.rates)):
            if time.monotonic() + args.duration > end_s:
                return
            outcomes = asyncio.run(sender.run(arrivals(mix, rate, args.duration, args.seed)))
            if number:  # the first time, graphs, caches and the policy's speeds are new
                row = figures(outcomes, rate, args.duration, num_ranks(config), limits)
                pipe.send(row)
                if row["good share"] < _HOPELESS:
                    return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


class Sender:
    """Sends random prompts, each a new one; a connection for each request that is open at a time."""

    def __init__(self, url: str, model: str, vocab_size: int, seed: int) -> None:
        self._url = url
        self._model = model
        self._vocab_size = vocab_size
        self._seed = seed
        self._num_made = 0
        self._free: list[Connection] = []

    async def run(self, due: Sequence[Due]) -> list[Outcome]:
        self._free = []  # connections belong to an event loop
        # Made before the first one is due: a burst of long prompts takes as long to make as a token takes.
        outcomes = await run_load([(request, functools.partial(self._send, self._body(request))) for request in due])
        for connection in self._free:
            connection.close()
        return outcomes

    def _body(self, request: Due) -> dict[str, Any]:
        self._num_made += 1
        (prompt,) = random_prompts(1, request.num_input, self._vocab_size, self._seed + self._num_made)
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": request.num_output,
            "stream": True,
            "ignore_eos": True,
        }

    async def _send(self, body: dict[str, Any]) -> Timeline:
        connection = self._free.pop() if self._free else Connection(self._url)
        try:
            return await connection.stream("/v1/completions", body)
        finally:
            self._free.append(connection)


def _told(row: Row) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in row.items())
