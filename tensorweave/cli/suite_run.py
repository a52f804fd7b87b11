"""Running the rows of a suite on an engine, ours or another: the arguments, the clock, the document that is written.

`tensorweave bench suite` and `benchmarks/rival_vllm.py` differ only in the engine that they hand to `run_suite`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

from tensorweave.cli.arguments import positive, rate
from tensorweave.cli.figures import machine
from tensorweave.cli.suite_figures import RowResult, card, markdown
from tensorweave.cli.suite_rows import SUITES, Row, Suite, digest_of
from tensorweave.cli.suite_shapes import ModelShape

_FIRST_PROMPT: Final = [11, 12, 13, 14, 15, 16, 17, 18]


class Generate(Protocol):
    def __call__(self, prompts: list[list[int]], output_len: int) -> list[int]:
        """Generate `output_len` tokens for each prompt, greedily. Return how many each got."""


OpenEngine = Callable[[Path], AbstractContextManager[Generate]]
"""Starts an engine with random weights from a directory that has config.json, or with the weights that are there."""


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=tuple(SUITES), metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these (default: all of the suite)")
    parser.add_argument("--runs", type=positive, metavar="N", help="of each row, the best counts (default: the row's)")
    add_quantization(parser)
    parser.add_argument("--model", type=Path, metavar="DIR", help="real weights instead of the suite's random ones")
    parser.add_argument(
        "--limit-s", type=rate, default=math.inf, metavar="S", help="start no run that cannot end in this time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures here, anew after each row")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table here")


def add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantization", choices=("none", "fp8", "w4a16"), default="none", help="weights (default: %(default)s)"
    )
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="KV cache (default: %(default)s)")


def suite_of(args: argparse.Namespace) -> Suite:
    """The suite that is named, with the shape of the model given by `--model`."""
    suite = SUITES[args.suite]
    return suite if args.model is None else dataclasses.replace(suite, shape=ModelShape.read(args.model))


def run_suite(
    args: argparse.Namespace,
    document: dict[str, Any],
    open_engine: OpenEngine,
    row_s: Callable[[Row], float] | None = None,
) -> None:
    """Start the engine, run the rows, and complete `document`. `row_s` gives a row's roofline in seconds."""
    suite = suite_of(args)
    rows = suite.choose(args.rows)
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = suite.shape.write(Path(folder), suite.dtype) if args.model is None else args.model
        with open_engine(model_dir) as generate:
            document["load_s"] = process_age_s()
            generate([_FIRST_PROMPT], 1)
            document["first_token_s"] = process_age_s()
            print(f"loaded in {document['load_s']} s, first token after {document['first_token_s']} s", flush=True)
            for result in run_rows(suite, rows, generate, args, began_s + args.limit_s, row_s):
                document["rows"].append(result.as_dict())
                print(line_of(document["rows"][-1]), flush=True)
                write(document, args)
    print(f"\n{markdown(document)}", flush=True)


def run_rows(
    suite: Suite,
    rows: Sequence[Row],
    generate: Generate,
    args: argparse.Namespace,
    deadline_s: float = math.inf,
    row_s: Callable[[Row], float] | None = None,
) -> Iterator[RowResult]:
    """Warm up, then run `rows` until `deadline_s` of `time.perf_counter`. A run that cannot end before it, by the row's
    roofline or its best run so far, is left out, and the result's note says so."""
    for warmup in suite.warmups:
        run_once(warmup, generate, warmup.prompts(suite.shape.vocab_size, args.seed, 0))
    for row in rows:
        result = RowResult(row, roofline_s=None if row_s is None else row_s(row))
        num_runs = args.runs or row.num_runs
        for run in range(num_runs):
            least_s = min(result.runs_s, default=result.roofline_s or 0.0)
            if time.perf_counter() + least_s > deadline_s:
                done = f"{run} of {num_runs} runs" if run else "not run"
                result.note = f"{done}: limited to {args.limit_s:g} s in all"
                break
            prompts = row.prompts(suite.shape.vocab_size, args.seed, run)
            result.runs_s.append(run_once(row, generate, prompts))
            result.digests.append(digest_of(prompts))
        yield result


def run_once(row: Row, generate: Generate, prompts: list[list[int]]) -> float:
    """Seconds from handing over all prompts to having all tokens."""
    began_s = time.perf_counter()
    lengths = generate(prompts, row.output_len)
    elapsed_s = time.perf_counter() - began_s
    if lengths != [row.output_len] * row.num_requests:
        raise AssertionError(f"{row.name}: {sum(lengths)} tokens instead of {row.num_requests * row.output_len}")
    return elapsed_s


def process_age_s() -> float:
    """Imports count too; ours are at a disadvantage by the time of measuring the device."""
    return round(time.time() - psutil.Process().create_time(), 2)


def new_document(args: argparse.Namespace, side: str, version: str) -> dict[str, Any]:
    """What is known before the first row."""
    suite = suite_of(args)
    return {
        "benchmark": "suite",
        "side": side,
        "version": version,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "suite": suite.name,
        "dtype": suite.dtype,
        "quantization": args.quantization,
        "kv_dtype": suite.dtype if args.kv_dtype == "auto" else args.kv_dtype,
        "weights": "random" if args.model is None else "real",
        "seed": args.seed,
        "card": card(),
        "machine": machine(),
        "rows": [],
    }


def write(document: dict[str, Any], args: argparse.Namespace) -> None:
    """After every row, so that a run that is ended early leaves the figures of those before."""
    for path, text in (
        (args.json, json.dumps(document, indent=1, default=str) + "\n"),
        (args.markdown, markdown(document)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def line_of(row: dict[str, Any]) -> str:
    """One row's figures as they come."""
    if not row["runs_s"]:
        return f"{row['row']:>20}  {row['note']}"
    share = f"  {row['roofline_share']:.1%} of the roofline" if "roofline_share" in row else ""
    runs = " ".join(f"{run_s:.3f}" for run_s in row["runs_s"])
    return f"{row['row']:>20}  {row['best_s']:8.3f} s  {row['tok_s']:10,.1f} tok/s{share}  ({runs}) {row['note']}"
