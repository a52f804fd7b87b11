"""Our engine and vLLM's, in turns in one run: output tokens a second, and the ratio.

    python benchmarks/duel.py --model DIR --rival-python VENV/bin/python --dtype float32 --json out.json
    python benchmarks/duel.py --model DIR --rival-python VENV/bin/python --growth --rounds 3 --json growth.json

Both engines stay loaded; only one computes at a time, and who goes first alternates. A turn during which other
processes took more than `--most-others` of the machine is taken again, at most twice; what remains is in the report.
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

WORKER = Path(__file__).with_name("duel_worker.py")
TURN_TIMEOUT_S = 900.0
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
class Turn:
    """`others`: the share of the machine's processor time that went to neither side."""

    elapsed_s: float
    own_cpu_s: float
    others: float


class Side:
    def __init__(self, name: str, python: str, args: argparse.Namespace, cases: list[Case]) -> None:
        self.name = name
        longest = max(case.num_input + case.num_output for case in cases)
        cached = max(case.batch * (case.num_input + case.num_output + 64) for case in cases)
        knobs = [str(args.model), args.dtype, str(longest), str(max(case.batch for case in cases)), str(cached)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        self._process = subprocess.Popen(
            [python, str(WORKER), name, *knobs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if self._ask(None) != "ready":
            raise RuntimeError(f"{name} did not start; --verbose shows why")

    def take(self, case: Case) -> Turn:
        busy_s, own_s, began_s = _busy_s(), self._own_s(), time.monotonic()
        elapsed_s = float(self._ask(f"{case.batch} {case.num_input} {case.num_output}"))
        own_s = self._own_s() - own_s
        available_s = (time.monotonic() - began_s) * (psutil.cpu_count() or 1)
        return Turn(elapsed_s, own_s, max(0.0, _busy_s() - busy_s - own_s) / available_s)

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
        """An answer comes, or the worker has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line is not None:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"{self.name} ended with {self._process.wait(TURN_TIMEOUT_S)}; --verbose shows why")
        return answer

    def _own_s(self) -> float:
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return float(sum(sum(member.cpu_times()[:2]) for member in family))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "softirq", 0) + getattr(times, "steal", 0))


def fight(sides: list[Side], case: Case, args: argparse.Namespace) -> dict[str, Any]:
    turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
    for side in sides:
        side.take(case)  # shapes that are new to an engine are compiled, memory is touched
    for turn in range(args.rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            tries = []
            while len(tries) < MOST_TRIES and (not tries or tries[-1].others > args.most_others):
                tries.append(side.take(case))
            turns[side.name].append(min(tries, key=lambda t: t.others))
    row: dict[str, Any] = {"case": str(case), **asdict(case)}
    num_tokens = case.batch * case.num_output
    for name, all_turns in turns.items():
        speeds = sorted(num_tokens / turn.elapsed_s for turn in all_turns)
        row |= {
            f"{name}_tok_s": statistics.median(speeds),
            f"{name}_least": speeds[0],
            f"{name}_most": speeds[-1],
            f"{name}_cpu_s": statistics.median(turn.own_cpu_s for turn in all_turns),
            f"{name}_others": max(turn.others for turn in all_turns),
        }
    if len(sides) > 1:
        row["ratio"] = row["tensorweave_tok_s"] / row["vllm_tok_s"]
    shown = "  ".join(
        f"{name} {row[f'{name}_tok_s']:7.1f} tok/s (others {row[f'{name}_others']:.0%})" for name in turns
    )
    print(f"{args.dtype} {case!s:>12}  {shown}  ratio {row.get('ratio', float('nan')):.2f}", flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory, for both")
    parser.add_argument("--rival-python", help="interpreter that has vllm; without it only ours is measured")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BATCHxINPUTxOUTPUT")
    parser.add_argument("--growth", action="store_true", help="cases of growing batch and growing prompt")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns a case (default: %(default)s)")
    parser.add_argument("--most-others", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [Case.parse(text) for text in (GROWTH if args.growth else args.cases)]
    contestants = {"tensorweave": sys.executable} | ({"vllm": args.rival_python} if args.rival_python else {})
    sides: list[Side] = []
    try:
        for name, python in contestants.items():
            sides.append(Side(name, python, args, cases))
        rows = [fight(sides, case, args) for case in cases]
    finally:
        for side in sides:
            side.close()
    settings = {"model": args.model.name, "dtype": args.dtype, "rounds": args.rounds, "most_others": args.most_others}
    publish(report("duel", settings, {"rows": rows}), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
