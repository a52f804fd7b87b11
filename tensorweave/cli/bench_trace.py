"""`tensorweave bench trace`: where the time of a decode step goes, on the user's model and machine.

For each batch size, requests decode together. First some steps run as they are: they give the time of a step and the
host's part in it. Then as many run under torch's profiler: they tell what the GPU did. With `--rows`, whole rows of a
suite are traced instead (`trace_row.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tensorweave.cli import bench_suite
from tensorweave.cli.figures import aligned, percentile, publish, report, settings_of
from tensorweave.cli.prompts import random_prompts
from tensorweave.cli.suite_figures import card
from tensorweave.cli.suite_rows import SUITES
from tensorweave.cli.suite_shapes import ModelShape
from tensorweave.cli.trace_events import KERNEL, last_part
from tensorweave.cli.trace_figures import device_steps, operator_shares
from tensorweave.cli.trace_row import chrome_path, told_row, trace_row
from tensorweave.deploy.config_file import read_document
from tensorweave.workers.store.model_store import resolve_model

if TYPE_CHECKING:
    from tensorweave import LLM, RequestOutput

_NUM_WARMUP_STEPS: Final = 16
_FIRST_LOOK_S: Final = 0.02
_PATIENCE_S: Final = 120.0
_HEAD: Final = (
    "batch", "step ms", "host ms", "p99", "| traced: step ms", "GPU busy", "idle in graphs", "idle between", "untraced",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from tensorweave.cli.trace_profiler import prepare  # imports torch

    if args.rows is not None and args.suite is None:
        raise ValueError("--rows are those of a suite: give --suite")
    with tempfile.TemporaryDirectory() as folder:
        model_dir, options = _model(args, Path(folder))
        prepare()
        from tensorweave import LLM

        with LLM(model=model_dir, skip_tokenizer_init=True, **options) as llm:
            vocab_size = ModelShape.read(model_dir).vocab_size
            suite_rows = [] if args.rows is None else SUITES[args.suite].choose(args.rows)
            rows = [trace_row(llm, row, vocab_size, args) for row in suite_rows]
            steps = [] if suite_rows else [_trace(llm, size, vocab_size, args) for size in args.batch_sizes]
    figures = {"card": card()["name"], "engine": options, "runs": {"rows": rows, "steps": steps}}
    publish(report("trace", settings_of(args), figures), args.json)
    print(f"\n{steps_table(steps)}" if steps else "\n".join(map(told_row, rows)))
    for traced in (*rows, *steps):
        print(f"\n{traced['title']}, by time:\n{shares_table(traced['shares'][: args.top])}")
    return 0


def _model(args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The model's directory, and the arguments of `LLM`: those of a suite, or those that were given."""
    if args.model is None:
        suite = SUITES[args.suite]
        options = bench_suite.engine_options(suite, args)
        return suite.shape.write(folder, suite.dtype), {"load_format": "dummy", **options}
    return resolve_model(args.model), read_document(os.devnull, [f"dtype={args.dtype}", *args.changes]).checked().data


def _trace(llm: LLM, batch_size: int, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    from tensorweave import SamplingParams
    from tensorweave.cli.trace_profiler import recording

    sampling = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    prompts = random_prompts(batch_size, args.input_len, vocab_size, args.seed + batch_size)
    outputs = [llm.generate_async(prompt, sampling) for prompt in prompts]
    try:
        with tempfile.TemporaryDirectory() as folder:
            take_steps(llm, outputs, _NUM_WARMUP_STEPS)
            plain = take_steps(llm, outputs, args.num_steps)
            path = Path(folder) / "trace.json" if args.chrome is None else chrome_path(args.chrome, f"b{batch_size}")
            with recording(path) as trace:
                took_s = time.perf_counter()
                traced = take_steps(llm, outputs, args.num_steps)
                took_s = time.perf_counter() - took_s
    finally:
        for output in outputs:
            output.abort()
    row: dict[str, Any] = {"title": f"a step of {batch_size}", "batch_size": batch_size}
    row |= {"step_ms": step_ms(plain), "traced_step_ms": step_ms(traced)}
    events = last_part(trace.events, took_s)
    is_gpu = any(event.kind == KERNEL for event in events)
    row |= host_figures(plain, is_gpu=is_gpu)
    if not is_gpu:
        return row | {"shares": [dataclasses.asdict(share) for share in operator_shares(events, len(traced))]}
    steps, shares = device_steps(events, len(traced))
    span_ms = (steps.busy_us + steps.inside_us) / 1e3
    row |= {**dataclasses.asdict(steps), "untraced_idle": max(0.0, 1 - span_ms / row["step_ms"])}
    return row | {"shares": [dataclasses.asdict(share) for share in shares]}


def take_steps(llm: LLM, outputs: Sequence[RequestOutput], num_steps: int) -> list[dict[str, Any]]:
    """Wait for so many steps from now on in which all requests decode and nothing else runs. Return their statistics,
    which may be of some more.

    Raises:
        ValueError: The requests ended first, or never ran together.
    """
    llm.get_stats()  # those of steps before
    steps: list[dict[str, Any]] = []
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        are_over = any(map(has_ended, outputs))  # before the statistics, so that those of the last step are counted
        steps += [row for row in llm.get_stats() if is_decode_step(row, len(outputs))]
        if len(steps) >= num_steps:
            return steps
        if are_over:
            raise ValueError("the requests ended before the trace did: raise --output-len")
        if time.monotonic() > deadline_s:
            raise ValueError(
                f"in {_PATIENCE_S:.0f} s, {len(steps)} steps had all {len(outputs)} requests in them: lower "
                "--batch-sizes, or raise max_batch_size or the KV cache"
            )
        each_s = step_ms(steps) / 1e3 if steps else _FIRST_LOOK_S
        threading.Event().wait(max(_FIRST_LOOK_S, each_s * (num_steps - len(steps))))


def has_ended(output: RequestOutput) -> bool:
    """Read what has come for the request: nobody else does, and `finished` says what has been read."""
    try:
        output.result(timeout=0)
    except TimeoutError:
        return False
    return True


def is_decode_step(row: dict[str, Any], batch_size: int) -> bool:
    running = row["inflightBatchingStats"]
    return bool(running["numGenRequests"] == batch_size and running["numContextRequests"] == 0)


def step_ms(steps: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(row["iterLatencyMS"] for row in steps)


def host_figures(steps: Sequence[dict[str, Any]], *, is_gpu: bool) -> dict[str, float]:
    """Median and 99th percentile of what the host does per step: on a GPU all but waiting for it, on a CPU all but the
    forward."""
    not_host = "waitLatencyMS" if is_gpu else "forwardLatencyMS"
    host_ms = sorted(row["iterLatencyMS"] - row[not_host] for row in steps)
    return {"host_ms_median": percentile(host_ms, 50), "host_ms_p99": percentile(host_ms, 99)}


def steps_table(rows: Sequence[dict[str, Any]]) -> str:
    """Without a GPU, the columns about it are empty. "untraced" is the share of an untraced step in which the GPU is
    idle between launches, where it takes as long for a launch as in the trace."""
    return aligned([_HEAD, *[_cells(row) for row in rows]])


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row["batch_size"]), *(f"{row[key]:.3f}" for key in ("step_ms", "host_ms_median", "host_ms_p99"))]
    if "busy_us" not in row:
        return [*cells, f"{row['traced_step_ms']:.3f}", "–", "–", "–", "–"]
    shares = [row[key] / row["step_us"] for key in ("busy_us", "inside_us", "between_us")]
    return [*cells, f"{row['step_us'] / 1e3:.3f}", *(f"{share:.1%}" for share in (*shares, row["untraced_idle"]))]


def shares_table(shares: Sequence[dict[str, Any]]) -> str:
    lines = [
        [share["name"], f"{share['per_step']:.1f}", f"{share['us_each']:.1f}", f"{share['us_per_step']:.1f}",
         f"{share['share']:.1%}"]
        for share in shares
    ]  # fmt: skip
    return aligned([["name", "number", "µs each", "µs in all", "share"], *lines], num_left=1)
