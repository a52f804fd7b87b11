"""Two engines in alternation in one run: this tree's, and vLLM's or that of another worktree. Output tokens per second.

    python benchmarks/duel.py --model DIR --baseline WORKTREE --dtype float32 bfloat16 --json out.json
    python benchmarks/duel.py --model DIR --vllm-python VENV/bin/python --growth --rounds 3 --json growth.json

Both engines stay loaded; only one computes at a time, and which one goes first alternates. A measurement during which
other processes took more than `--most-others` of the machine is repeated, at most twice; what remains is in the report.
The engine that is loaded first may be slower by 5 % for good (an engine against itself gave 0.91 to 0.96), so all is
measured in both orders: `ratios` are those of the medians in each order, `ratio` is their geometric mean.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.figures import publish, report

TREE = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("duel_worker.py")
EXIT_TIMEOUT_S = 900.0
MOST_TRIES = 3
CASES = ["16x128x64", "1x128x64", "64x128x64"]
GROWTH = [f"{batch}x128x64" for batch in (1, 2, 4, 8, 16, 32, 64)]
GROWTH += [f"1x{length}x64" for length in (256, 512, 1024, 2048, 4096)]


@dataclass(frozen=True)
class Case:
    batch: int
    num_input: int
    num_output: int

    @classmethod
    def parse(cls, text: str) -> Case:
        return cls(*(int(part) for part in text.split("x")))

    def __str__(self) -> str:
        return f"{self.batch}x{self.num_input}x{self.num_output}"


@dataclass(frozen=True)
class Measurement:
    """`others`: the share of the machine's processor time that went to neither engine."""

    elapsed_s: float
    own_cpu_s: float
    others: float


@dataclass(frozen=True)
class Contender:
    """`name` is its prefix in the report; `tree` is where our own engine is imported from."""

    name: str
    engine: str
    python: str
    tree: Path = TREE


class Worker:
    """An engine in a process of its own."""

    def __init__(self, contender: Contender, dtype: str, cases: list[Case], args: argparse.Namespace) -> None:
        self.name = contender.name
        longest = max(case.num_input + case.num_output for case in cases)
        cached = max(case.batch * (case.num_input + case.num_output + 64) for case in cases)
        knobs = [str(args.model), dtype, str(longest), str(max(case.batch for case in cases)), str(cached)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        self._process = subprocess.Popen(
            [contender.python, str(WORKER), contender.engine, str(contender.tree), *knobs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if self._ask(None) != "ready":
            raise RuntimeError(f"{self.name} did not start; --verbose shows why")

    def measure(self, case: Case) -> Measurement:
        busy_s, own_s, began_s = _busy_s(), self._own_s(), time.monotonic()
        elapsed_s = float(self._ask(f"{case.batch} {case.num_input} {case.num_output}"))
        own_s = self._own_s() - own_s
        available_s = (time.monotonic() - began_s) * (psutil.cpu_count() or 1)
        return Measurement(elapsed_s, own_s, max(0.0, _busy_s() - busy_s - own_s) / available_s)

    def close(self) -> None:
        """The engine's own processes go too: they may outlive the one that started them."""
        assert self._process.stdin is not None
        family = [psutil.Process(self._process.pid)] if self._process.poll() is None else []
        family += [child for process in family for child in process.children(recursive=True)]
        self._process.stdin.close()
        _, late = psutil.wait_procs(family, 10)
        for process in late:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(30)

    def _ask(self, line: str | None) -> str:
        """Return the next line that the worker writes. It writes one, or it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line is not None:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"{self.name} ended with {self._process.wait(EXIT_TIMEOUT_S)}; --verbose shows why")
        return answer

    def _own_s(self) -> float:
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return float(sum(sum(member.cpu_times()[:2]) for member in family))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "softirq", 0) + getattr(times, "steal", 0))


def measure_rounds(workers: list[Worker], case: Case, args: argparse.Namespace) -> dict[str, list[Measurement]]:
    """Measurements of each worker by its name; those at the same place were made one after the other."""
    measured: dict[str, list[Measurement]] = {worker.name: [] for worker in workers}
    for worker in workers:
        worker.measure(case)  # warm-up: shapes that are new to an engine are compiled, memory is touched
    for number in range(args.rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            measured[worker.name].append(measure_undisturbed(worker, case, args.most_others))
    return measured


def compare(case: Case, dtype: str, orders: list[dict[str, list[Measurement]]]) -> dict[str, Any]:
    """One row of the report, from the measurements of each order in which the engines were loaded."""
    names = list(orders[0])
    row = {"case": str(case), "dtype": dtype, **asdict(case)}
    for name in names:
        row |= figures_of(name, case, [measurement for measured in orders for measurement in measured[name]])
    shown = [f"{name} {row[f'{name}_tok_s']:7.1f} tok/s (others {row[f'{name}_others']:.0%})" for name in names]
    if len(names) > 1:
        ours, other = names
        row["ratios"] = [_median_s(measured[other]) / _median_s(measured[ours]) for measured in orders]
        row["ratio"] = statistics.geometric_mean(row["ratios"])
        by_order = ", ".join(f"{ratio:.3f}" for ratio in row["ratios"])
        shown.append(f"ratio {row['ratio']:.3f} (by order {by_order})")
    print(f"{dtype} {case!s:>12}  {'  '.join(shown)}", flush=True)
    return row


def _median_s(measurements: list[Measurement]) -> float:
    return statistics.median(measurement.elapsed_s for measurement in measurements)


def measure_undisturbed(worker: Worker, case: Case, most_others: float) -> Measurement:
    """Return the least disturbed of up to `MOST_TRIES` measurements."""
    tries = [worker.measure(case)]
    while tries[-1].others > most_others and len(tries) < MOST_TRIES:
        tries.append(worker.measure(case))
    return min(tries, key=lambda measurement: measurement.others)


def figures_of(name: str, case: Case, measurements: list[Measurement]) -> dict[str, float]:
    speeds = sorted(case.batch * case.num_output / measurement.elapsed_s for measurement in measurements)
    return {
        f"{name}_tok_s": statistics.median(speeds),
        f"{name}_least": speeds[0],
        f"{name}_most": speeds[-1],
        f"{name}_cpu_s": statistics.median(measurement.own_cpu_s for measurement in measurements),
        f"{name}_others": max(measurement.others for measurement in measurements),
    }


def compare_all(
    contenders: list[Contender], dtype: str, cases: list[Case], args: argparse.Namespace
) -> list[dict[str, Any]]:
    orders = [contenders] if len(contenders) == 1 else [contenders, contenders[::-1]]
    measured = [measure_order(order, dtype, cases, args) for order in orders]
    return [compare(case, dtype, [_sort(each[case], contenders) for each in measured]) for case in cases]


def measure_order(
    contenders: list[Contender], dtype: str, cases: list[Case], args: argparse.Namespace
) -> dict[Case, dict[str, list[Measurement]]]:
    """Load the engines in this order, measure every case, end them."""
    workers: list[Worker] = []
    try:
        workers += (Worker(contender, dtype, cases, args) for contender in contenders)
        return {case: measure_rounds(workers, case, args) for case in cases}
    finally:
        for worker in workers:
            worker.close()


def _sort(measured: dict[str, list[Measurement]], contenders: list[Contender]) -> dict[str, list[Measurement]]:
    return {contender.name: measured[contender.name] for contender in contenders}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory, for both")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--vllm-python", help="compare with vLLM: an interpreter that has it")
    other.add_argument("--baseline", type=Path, help="compare with our engine as it is in another worktree")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BATCHxINPUTxOUTPUT")
    parser.add_argument("--growth", action="store_true", help="cases of growing batch and growing prompt")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements per case, engine and order (default: %(default)s)"
    )
    parser.add_argument("--most-others", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [Case.parse(text) for text in (GROWTH if args.growth else args.cases)]
    contenders = [Contender("tensorweave", "tensorweave", sys.executable)]
    if args.vllm_python:
        contenders.append(Contender("vllm", "vllm", args.vllm_python))
    if args.baseline:
        contenders.append(Contender("baseline", "tensorweave", sys.executable, args.baseline.resolve()))
    rows = [row for dtype in args.dtype for row in compare_all(contenders, dtype, cases, args)]
    settings = {"model": args.model.name, "rounds": args.rounds, "most_others": args.most_others}
    publish(report("duel", settings, {"rows": rows}), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
