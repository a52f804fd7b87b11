"""`tensorweave chaos`: start a service, load it, break it in every way it should survive, and compare each answer with
the undisturbed one.

Recovery time of a round (`recover_s`): the longest time, counted from the fault, that the client of any request open at
the fault waited for more of its answer. Exit code 1 when a request failed, an answer changed, or the service did not
become whole again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

_EXAMPLES = """\
examples:
  tensorweave chaos --config deploy/examples/chaos.yaml --rounds 3
  tensorweave chaos --config deploy/examples/chaos.yaml --rounds 20 --faults kill,hang --json out.json
  tensorweave chaos --config deploy/examples/chaos.yaml --faults kill-both-0,drain

faults: kill-ROLE-RANK (SIGKILL), hang-ROLE-RANK (SIGSTOP), kill-router (with two front ends), drain (SIGTERM), none (a
control); a kind alone stands for all of it. Only processes that the command has started itself are killed.
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
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the service's YAML")
    parser.add_argument(
        "--rounds", type=_positive, default=3, metavar="N", help="rounds a fault (default: %(default)s)"
    )
    parser.add_argument("--faults", metavar="A,B", help="which (default: all that the configuration allows)")
    parser.add_argument(
        "--clients", type=_positive, default=32, metavar="N", help="streaming clients (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=64, metavar="N", help="different requests (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, victims and moments (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="longest request (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table here, as a list")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append what the service says")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the configuration",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tensorweave.cli.chaos_faults import choose_faults
    from tensorweave.cli.chaos_service import serve_arguments
    from tensorweave.deploy.config import load_config

    config = load_config(args.config, args.changes)
    if config.ray.address is not None:
        raise ValueError(
            "ray.address: chaos kills processes, so it only runs on a Ray cluster of its own; leave it out"
        )
    faults = choose_faults(config, args.faults)
    with tempfile.TemporaryDirectory(prefix="tensorweave-chaos-") as directory:
        arguments = serve_arguments(args.config, config, args.changes, Path(directory))
        return _run_all(args, faults, arguments)


def _run_all(args: argparse.Namespace, faults: Sequence[Any], arguments: Sequence[str]) -> int:
    from tensorweave.cli.chaos_load import OracleFailed
    from tensorweave.cli.chaos_rounds import Experiment, Row, Settings, say
    from tensorweave.cli.chaos_service import ProcessTree, ServiceBroken
    from tensorweave.deploy.config import load_config

    config = load_config(arguments[1], arguments[3::2])
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        write_table(rows, args.json)

    settings = Settings(args.clients, max(args.jobs, args.clients), args.seed, args.timeout)
    with ProcessTree() as tree:
        experiment = Experiment(config, arguments, tree, settings, keep, args.log)
        try:
            asyncio.run(_until_signal(experiment.run(faults, args.rounds)))
        except (ServiceBroken, OracleFailed) as problem:
            say(str(problem))
            experiment.problems.append(str(problem))
        except asyncio.CancelledError:
            return _INTERRUPTED
        finally:
            print(format_table(rows), flush=True)
    return 0 if not experiment.problems and all(row.is_clean for row in rows) else 1


async def _until_signal(work: Any) -> None:
    """The first Ctrl-C or SIGTERM ends the work in order: the service drains. A second one kills what is left."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await task


def write_table(rows: Sequence[Any], path: Path | None) -> None:
    """The JSON so far: it is written after every fault, so that an interrupted run keeps what it has."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row.to_plain() for row in rows], indent=2) + "\n", encoding="utf-8")


def format_table(rows: Sequence[Any]) -> str:
    table = [_COLUMNS, *(tuple(_shown(row.to_plain()[column]) for column in _COLUMNS) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) if number == 0 else cell.rjust(width) for number, (cell, width) in enumerate(cells))
        for line in table
        for cells in (list(zip(line, widths, strict=True)),)
    )


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
