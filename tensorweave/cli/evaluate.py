"""`tensorweave eval`: tasks of lm-evaluation-harness against a service, with thresholds that set the exit code.

Exit codes: 0 all thresholds are met; 1 a failure; 2 a mistake; 3 a figure is below its threshold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tensorweave.cli.arguments import bearer, count, positive, rate
from tensorweave.cli.own_service import add_service, service_url

_BELOW: Final = 3
_EXAMPLES = """\
examples:
  tensorweave eval --model smollm2 --tasks json_mode --chat --min parsed=0.9
  tensorweave eval --url http://127.0.0.1:8000 --tokenizer MODEL_DIR --tasks ./my_tasks arc_easy --min arc_easy:acc=0.3

It needs lm-evaluation-harness: pip install 'tensorweave[eval]'. --tasks takes names of lm-eval's tasks and of ours
(json_mode), YAML files, and folders of them. Exit code 3: a figure is below its --min.
"""


@dataclass(frozen=True, slots=True)
class Threshold:
    """`--min [TASK:]METRIC=NUMBER`; without a task it is for every task that has the metric."""

    task: str | None
    metric: str
    least: float

    @classmethod
    def parse(cls, text: str) -> Self:
        name, _, number = text.rpartition("=")
        task, _, metric = name.rpartition(":")
        try:
            least = float(number)
        except ValueError:
            least = math.nan
        if not metric or math.isnan(least):
            raise argparse.ArgumentTypeError(f"{text} is not of the form [TASK:]METRIC=NUMBER")
        return cls(task or None, metric, least)

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """What it is for, by name. lm-eval's own names are `METRIC,FILTER`."""
        return {
            f"{task} {name}": float(figure)
            for task, figures in results.items()
            if self.task in (None, task)
            for name, figure in figures.items()
            if self.metric in (name, name.partition(",")[0])
        }

    def problems(self, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Raises ValueError if there is no such figure."""
        if not (figures := self.figures(results)):
            known = sorted({name for figures in results.values() for name in figures if "," in name})
            raise ValueError(f"--min: no task has {self.metric!r}; there are {', '.join(known)}")
        return [
            f"{name} is {figure:.4g}, below {self.least:g}"
            for name, figure in figures.items()
            if not figure >= self.least
        ]


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="score a model with lm-evaluation-harness",
        description="Run tasks of lm-evaluation-harness against a service.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names, YAML files or folders of them"
    )
    parser.add_argument("--chat", action="store_true", help="ask chats; tasks of log-likelihoods need completions")
    parser.add_argument("--tokenizer", metavar="DIR", help="the model's directory, for completions with --url")
    parser.add_argument(
        "--min", dest="thresholds", type=Threshold.parse, action="append", default=[], metavar="[TASK:]METRIC=X",
        help="exit with 3 if the figure is below X",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", help="the first questions of each task alone")
    parser.add_argument("--num-fewshot", type=count, metavar="N", help="examples before a question")
    parser.add_argument("--concurrency", type=positive, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=rate, default=600.0, metavar="S", help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write lm-eval's results here, with every sample")
    add_service(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _require_lm_eval()
    from tensorweave.cli.evaluate_run import evaluate, table

    if args.url is not None and args.tokenizer is None and not args.chat:
        raise ValueError("--tokenizer: completions with --url need the model's directory or its name on the hub")
    with service_url(args) as url:
        results = evaluate(args, url, bearer(args.api_key))
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    return judge(args.thresholds, results["results"])


def judge(thresholds: Sequence[Threshold], results: Mapping[str, Mapping[str, Any]]) -> int:
    problems = [problem for threshold in thresholds for problem in threshold.problems(results)]
    for problem in problems:
        print(f"tensorweave: {problem}", file=sys.stderr)
    return _BELOW if problems else 0


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is missing ({error}): pip install 'tensorweave[eval]'") from None
