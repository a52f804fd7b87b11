"""`tensorweave serve`: a YAML file, changes to it, and the service that it describes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx

from tensorweave.cli import chat
from tensorweave.cli.arguments import add_api_key, add_changes, bearer
from tensorweave.cli.endpoint_file import endpoint_file

_DEFAULT_CONFIG: Final = "laptop.yaml"
_ANSWER_TIMEOUT_S: Final = 120.0
_HOW_TO: Final = """
Serving {model} at {url}. Talk to it:
  tensorweave chat --url {url}{option}
  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  openai.OpenAI(base_url="{url}/v1", api_key="{key}").chat.completions.create(model="{model}", messages=[...])
Ctrl-C stops it."""
_EXAMPLES = """\
examples:
  tensorweave serve --model smollm2
  tensorweave serve --config service.yaml
  tensorweave serve --config service.yaml --set pools.decode.tensor_parallel_size=2 --set router.port=9000

Every key of the file can be changed with --set; the value is read as YAML. Ctrl-C or SIGTERM drains and ends it.
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start the service",
        description="Start the service that a YAML file describes, and stay until it is stopped.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"the service's YAML (default: ours, {_DEFAULT_CONFIG})"
    )
    parser.add_argument("--model", help="serve this model: a directory, a hub id, or smollm2")
    add_changes(parser, "change a key, for example a.b=c")
    parser.add_argument("--ask", metavar="TEXT", help="once it is ready, print the answer to this and how to continue")
    parser.add_argument(
        "--endpoint-file", type=Path, metavar="FILE", help="once it is ready, its URL is in this file, until it ends"
    )
    add_api_key(parser, "sent with --ask: one of the service's own, where it asks for keys")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tensorweave.deploy.config import load_config

    config = load_config(config_path(args.config), config_changes(args))
    from tensorweave.deploy.service import run as run_service  # imports ray for a second, after the file was checked

    with contextlib.ExitStack() as closing:
        actions: list[Callable[[str], None]] = []
        if args.endpoint_file is not None:
            actions.append(closing.enter_context(endpoint_file(args.endpoint_file)))
        if args.ask is not None:
            actions.append(functools.partial(greet, question=args.ask, api_key=args.api_key))
        return run_service(config, *actions)


def greet(url: str, question: str, api_key: str | None = None) -> None:
    """Stream one answer to the terminal, and print how to continue. If the question fails, the service stays up."""
    try:
        timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, connect=chat.CONNECT_TIMEOUT_S)
        with httpx.Client(base_url=url, headers=bearer(api_key), timeout=timeout) as client:
            conversation = chat.Conversation(client, chat.first_model(client))
            print(f"\n> {question}", flush=True)
            chat.print_answer(conversation.ask(question, {"max_tokens": 128, "temperature": 0}), sys.stdout)
    except chat.ChatFailed as error:
        print(f"tensorweave: the question was not answered: {error}", file=sys.stderr)
        return
    with_key = {"option": " --api-key KEY", "header": " -H 'Authorization: Bearer KEY'", "key": "KEY"}
    without = {"option": "            (or: make chat)", "header": "", "key": "none"}
    print(_HOW_TO.format(url=url, model=conversation.model, **(with_key if api_key else without)), flush=True)


def config_path(given: Path | None) -> Path:
    """The file given, or the example that comes with the package."""
    import tensorweave.deploy.config as config_module

    return given or Path(config_module.__file__).parent / "examples" / _DEFAULT_CONFIG


def config_changes(args: argparse.Namespace) -> list[str]:
    """The `--set` changes after those of `--model`, which also removes the file's served name: that is another
    model's."""
    if args.model is None:
        return list(args.changes)
    # As a JSON string, so that YAML takes any path as text.
    return [f"model={json.dumps(args.model)}", "served_model_name=null", *args.changes]
