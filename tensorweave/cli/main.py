"""The `tensorweave` command: parses the arguments, calls the module of the subcommand, and reports its errors.

Exit codes: 0 success, 1 a failure (no server, no download, a lost worker), 2 a mistake in the command or in a
configuration, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tensorweave.cli import (
    batch,
    bench,
    changes,
    chaos,
    chat,
    evaluate,
    models,
    ray_node,
    replay,
    serve,
    soak,
    top,
    version,
)
from tensorweave.cli.boundary import report

_EXAMPLES = """\
examples:
  tensorweave serve --model smollm2                      serve the small model that needs no hub, on 127.0.0.1:8000
  tensorweave serve --config service.yaml --set router.port=9000
  tensorweave chat                                       talk to it from another terminal
  tensorweave top                                        watch what it does
  tensorweave scale decode 3                             change it while it runs; also move, update
  tensorweave bench throughput --model smollm2 --dtype float32 --json out.json
  tensorweave COMMAND --help                             more of each command
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tensorweave",
        description="Multi-node LLM serving on Ray.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, chat, top, batch, evaluate, bench, replay, chaos, soak, models, ray_node, version):
        command.add_command(commands)
    changes.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. The console script `tensorweave`."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tensorweave … | head`
        sys.stderr.close()
        return 1
    except Exception as error:  # the command line's boundary
        if args.traceback:
            raise
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
