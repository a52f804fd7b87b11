"""`tensorweave ray`: Ray's own command line, for nodes that are to last."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

_EXAMPLES = """\
examples:
  tensorweave ray start --head --dashboard-host=10.0.0.1 --block
  tensorweave ray start --address=10.0.0.1:6379 --block
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "ray",
        help="start Ray on this host so that it outlives its agents",
        description="Run Ray's own command line, with two differences for `start`: an agent of Ray's (dashboard agent, "
        "runtime environment agent) that is killed or crashes is started again, where Ray alone ends the whole node; "
        "and a node may take 240 s to start instead of 30.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        prefix_chars="\0",  # options are Ray's
    )
    parser.add_argument("arguments", nargs="*", metavar="…", help="as `ray` takes them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> NoReturn:
    from tensorweave.cluster.ray_node import run_ray

    run_ray(args.arguments)
