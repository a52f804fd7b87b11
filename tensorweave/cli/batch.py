"""`tensorweave batch`: a JSON Lines file of requests in OpenAI's batch format, answered once each.

Exit codes: 0 all lines are answered; 1 a failure, for example a full disk; 2 a mistake; 3 lines are left, and the same
command continues with them; 4 each line has a result, and some are errors.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tensorweave.cli.arguments import bearer, positive, rate
from tensorweave.cli.own_service import add_service, service_url

_MISTAKE: Final = 2
_LINES_LEFT: Final = 3
_SOME_ARE_ERRORS: Final = 4
_EXAMPLES = """\
examples:
  tensorweave batch --input in.jsonl --output out.jsonl --model smollm2
  tensorweave batch --input in.jsonl --output out.jsonl --url http://127.0.0.1:8000 --concurrency 256

A line of the input: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": ..., ...}}
The same command continues after a kill: each line has one result. Ctrl-C lets running requests finish.
Exit codes: 0 all lines are answered, 1 a failure, 2 a mistake in the command or the files, 3 lines are left, 4 none is
left and some are errors.
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer the requests of a JSON Lines file in OpenAI's batch format.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="requests, one per line")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="answers are appended here")
    parser.add_argument(
        "--errors", type=Path, metavar="FILE", help="lines that are refused (default: OUTPUT with .errors.jsonl)"
    )
    parser.add_argument("--concurrency", type=positive, default=64, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=rate, default=600.0, metavar="S", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--retry-for-s", type=rate, default=300.0, metavar="S", help="how long to retry (default: %(default)s)"
    )
    add_service(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tensorweave.cli.batch_input import LineIndex, read_lines
    from tensorweave.cli.batch_output import ResultFile
    from tensorweave.cli.batch_run import BatchSettings, Counts, run_batch

    if args.url is not None and args.model is not None:
        raise ValueError("--model is for a service of this command's own; a request names its model in its body")
    paths = [args.input, args.output, args.errors or args.output.with_suffix(".errors.jsonl")]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("--input, --output and --errors must be three files")
    with ExitStack() as closing:
        index = closing.enter_context(LineIndex())
        index.fill(read_lines(args.input))  # before the output is made: a wrong input leaves nothing behind
        output, errors = (closing.enter_context(ResultFile(path)) for path in paths[1:])
        counts = Counts(index.total, index.mark_done(output.keys()), index.mark_done(errors.keys()))
        ending = None
        if counts.left:
            lines = index.open_lines(read_lines(args.input))
            url = closing.enter_context(service_url(args))
            settings = BatchSettings(bearer(args.api_key), args.concurrency, args.timeout, args.retry_for_s)
            ending = asyncio.run(run_batch(url, settings, lines, counts, output, errors))
    if ending is not None and ending.reason is not None and counts.left:
        print(f"tensorweave: {ending.reason}", file=sys.stderr)
    found = f"{counts.answered} answered, {counts.errors} errors ({paths[2]}), {counts.left} left"
    print(f"tensorweave: {found}", file=sys.stderr)
    if ending is not None and ending.is_refused:
        return _MISTAKE
    return _LINES_LEFT if counts.left else _SOME_ARE_ERRORS if counts.errors else 0
