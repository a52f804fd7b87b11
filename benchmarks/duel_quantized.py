"""Our engine in bfloat16 and with integer weights, and llama.cpp, in alternation in one run. Output tokens per second.

    python benchmarks/duel_quantized.py --model DIR --llama-python VENV/bin/python --gguf q8_0=FILE q4_0=FILE

Each runs on all cores, in a process of its own that stays loaded; only one computes at a time, in an order that turns
around from round to round. Output tokens may be 1: the difference of two cases is decoding alone. Under `taskset -c 1`
each has one thread, whose processor time says more than the clock where other work runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.duel import Case, Contender, Measurement, Worker, figures_of
from tensorweave.cli.figures import publish, report

CASES = ["1x128x64", "1x128x1", "16x128x64", "16x128x1", "1x512x1"]
ALGORITHMS = ["W8A16", "INT8", "W4A16", "W4A8_QSERVE_PER_GROUP"]


def start(args: argparse.Namespace, cases: list[Case], workers: list[Worker]) -> None:
    ours = [("bfloat16", "bfloat16"), *((name, f"bfloat16:{name}") for name in args.algorithms)]
    for name, dtype in ours:
        workers.append(Worker(Contender(name, "tensorweave", sys.executable), dtype, cases, args))
    for gguf in args.gguf:
        name, _, file = gguf.partition("=")
        given = argparse.Namespace(**{**vars(args), "model": Path(file).resolve()})
        workers.append(Worker(Contender(name, "llama_cpp", args.llama_python), "gguf", cases, given))


def measure(workers: list[Worker], case: Case, rounds: int) -> dict[str, Any]:
    measured: dict[str, list[Measurement]] = {worker.name: [] for worker in workers}
    for worker in workers:
        worker.measure(case)
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            measured[worker.name].append(worker.measure(case))
    row: dict[str, Any] = {"case": str(case)}
    for name, measurements in measured.items():
        times_s = sorted(measurement.elapsed_s for measurement in measurements)
        row |= figures_of(name, case, measurements)
        row |= {f"{name}_median_s": statistics.median(times_s), f"{name}_least_s": times_s[0]}
        speed = case.batch * (case.num_output if case.num_output > 1 else case.num_input) / row[f"{name}_median_s"]
        others = row[f"{name}_others"]
        cpu_ms = row[f"{name}_cpu_s"] * 1e3
        print(f"{case!s:>12} {name:24} median {row[f'{name}_median_s'] * 1e3:8.1f} ms  least {times_s[0] * 1e3:8.1f} ms"
              f"  processor {cpu_ms:8.1f} ms  {speed:8.1f} tok/s  others {others:.0%}", flush=True)  # fmt: skip
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="*", default=ALGORITHMS)
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter with llama-cpp-python")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BATCHxINPUTxOUTPUT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [Case.parse(text) for text in args.cases]
    workers: list[Worker] = []
    try:
        start(args, cases, workers)
        rows = [measure(workers, case, args.rounds) for case in cases]
    finally:
        for worker in workers:
            worker.close()
    publish(report("duel_quantized", {"model": args.model.name, "rounds": args.rounds}, {"rows": rows}), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
