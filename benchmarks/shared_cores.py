"""Steps of two threads beside other processes on their cores: the native kernels of this tree and of another, in turns.

    python benchmarks/shared_cores.py --baseline /path/to/another/tree --niceness 15

A step is 120 products of 8 rows on two threads, then 1 ms on one. Prints, per kind of company, the milliseconds of a
step: mean, median, 99th percentile, longest. The company runs at its own niceness, whatever that of the steps is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

_WORKER = """
import json, sys, time, torch
from tensorweave.kernels.native.library import use_threads
from tests.kernels.forms import operations_of

torch.set_num_threads(1)
use_threads(2)
make_linear = operations_of("native", torch.float32).make_linear
linears, x = [make_linear(torch.randn(1536, 576), None) for _ in range(30)], torch.randn(8, 576)

def step():
    for _ in range(4):
        for linear in linears:
            linear(x)
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass

step()
print("ready", flush=True)
for line in sys.stdin:
    last = time.perf_counter()
    end, took = last + float(line), []
    while last < end:
        step()
        now = time.perf_counter()
        took.append(now - last)
        last = now
    print(json.dumps(took), flush=True)
"""
_BURSTS = """
import time
while True:
    end = time.perf_counter() + {0}
    while time.perf_counter() < end:
        pass
    time.sleep({1})
"""
_IDLE_POLICY = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
COMPANY: dict[str, tuple[str, int] | None] = {
    "none": None,
    "a process, niceness 0": ("while True: pass", 0),
    "a process, niceness 15": ("while True: pass", 15),
    "a process, policy for idle work": (_IDLE_POLICY + "while True: pass", 0),
    "1 of 6 ms, niceness 0": (_BURSTS.format(0.001, 0.005), 0),
    "10 of 20 ms, niceness 0": (_BURSTS.format(0.01, 0.01), 0),
}


class Worker:
    def __init__(self, tree: Path, niceness: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=partial(os.setpriority, os.PRIO_PROCESS, 0, niceness),
        )
        self._read()

    def steps(self, seconds: float) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        took: list[float] = json.loads(self._read())
        return took

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def start_company(kind: str) -> subprocess.Popen[bytes] | None:
    company = COMPANY[kind]
    if company is None:
        return None
    code, niceness = company
    lower = partial(os.setpriority, os.PRIO_PROCESS, 0, niceness)
    process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=lower)
    time.sleep(0.3)  # it has begun
    return process


def summary(took_s: list[float]) -> str:
    ordered = sorted(1e3 * seconds for seconds in took_s)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    return f"{statistics.mean(ordered):.1f}, {statistics.median(ordered):.1f}, {p99:.0f}, {ordered[-1]:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True, help="another tree")
    parser.add_argument("--niceness", type=int, default=0, help="of the steps (0)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each tree in a round (0.7)")
    args = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    workers = {name: Worker(tree, args.niceness) for name, tree in (("before", args.baseline), ("now", here))}
    for kind in COMPANY:
        company = start_company(kind)
        took: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                took[name] += worker.steps(args.seconds)
        if company is not None:
            company.kill()
            company.wait()
        print(f"{kind:32}", *(f"| {name}: {summary(each)}" for name, each in took.items()), flush=True)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
