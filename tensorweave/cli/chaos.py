"""`tensorweave chaos`: start a service, load it, inject every fault that it should survive, and compare each answer
with the undisturbed one.

Recovery time of a round (`recover_s`): the longest time, counted from the fault, that the client of any request open at
the fault waited for more of its answer. Exit code 1 if a request failed, an answer changed, or the service did not
become whole again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tensorweave.cli.arguments import add_trial, positive
from tensorweave.cli.figures import aligned
from tensorweave.workers.store.disk import writing_into

_EXAMPLES = """\
examples:
  tensorweave chaos --config deploy/examples/chaos.yaml --rounds 3
  tensorweave chaos --config deploy/examples/chaos.yaml --rounds 20 --faults kill,hang --json out.json
  tensorweave chaos --config deploy/examples/chaos.yaml --faults kill-both-0,drain

faults: kill-ROLE-RANK (SIGKILL), hang-ROLE-RANK (SIGSTOP), kill-router (with two front ends), kill-supervisor, drain
(SIGTERM), none (a control); a kind alone stands for all of it. Only processes that the command itself has started are
killed.
"""
_COLUMNS: Final = ("fault", "injected", "requests", "failed", "changed", "recover_s_median", "recover_s_max")
_INTERRUPTED: Final = 130


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "chaos",
        help="break a service and check that nobody notices",
        description="Start a service, break it under load, and compare every answer with the undisturbed one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_trial(parser)
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="rounds per fault (default: %(default)s)"
    )
    parser.add_argument("--faults", metavar="A,B", help="which (default: all that the configuration allows)")
    parser.add_argument(
        "--clients", type=positive, default=32, metavar="N", help="streaming clients (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=positive, default=64, metavar="N", help="different requests (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table here, as a list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tensorweave.cli.chaos_faults import choose_faults
    from tensorweave.cli.trial_service import prepared_trial

    with prepared_trial(args.config, args.changes, args.api_key) as trial:
        return _run_all(args, choose_faults(trial.config, args.faults), trial)


def _run_all(args: argparse.Namespace, faults: Sequence[Any], trial: Any) -> int:
    from tensorweave.cli.chaos_rounds import Experiment, FaultResult, Settings, say
    from tensorweave.cli.process_tree import ProcessTree
    from tensorweave.cli.trial_load import OracleFailed
    from tensorweave.cli.trial_service import ServiceBroken

    results: list[FaultResult] = []

    def keep(result: FaultResult) -> None:
        results.append(result)
        write_table(results, args.json)

    settings = Settings(args.clients, max(args.jobs, args.clients), args.seed, args.timeout)
    with ProcessTree() as tree:
        experiment = Experiment(trial, tree, settings, keep, args.log)
        try:
            asyncio.run(_until_signal(experiment.run(faults, args.rounds)))
        except (ServiceBroken, OracleFailed) as problem:
            say(str(problem))
            experiment.problems.append(str(problem))
        except asyncio.CancelledError:
            return _INTERRUPTED
        finally:
            print(format_table(results), flush=True)
    return 0 if not experiment.problems and all(result.is_clean for result in results) else 1


async def _until_signal(work: Any) -> None:
    """The first Ctrl-C or SIGTERM cancels the work: the service drains. A second one kills the remaining processes."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await task


def write_table(results: Sequence[Any], path: Path | None) -> None:
    """Write the results so far, atomically. Called after every fault, so that an interrupted run keeps its results."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.part")
        with writing_into(draft.parent):
            draft.write_text(json.dumps([result.to_plain() for result in results], indent=2) + "\n", encoding="utf-8")
        draft.replace(path)


def format_table(results: Sequence[Any]) -> str:
    lines = [[_shown(result.to_plain()[column]) for column in _COLUMNS] for result in results]
    return aligned([_COLUMNS, *lines], num_left=1)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
