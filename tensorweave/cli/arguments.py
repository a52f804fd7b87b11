"""Arguments that several commands have, and the parsers of numbers."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_changes(parser: argparse.ArgumentParser, what: str) -> None:
    """`--set KEY=VALUE`, any number of times: `args.changes`."""
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help=what)


def add_api_key(parser: argparse.ArgumentParser, what: str = "sent as the bearer token") -> None:
    parser.add_argument("--api-key", metavar="KEY", help=what)


def add_trial(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that starts a service of its own to test it."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the service's YAML")
    add_changes(parser, "change a key of the configuration")
    add_api_key(parser, "one of the service's own, where it asks for keys")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="longest request (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the log of the service")


def bearer(api_key: str | None) -> dict[str, str]:
    """The headers with this API key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def rate(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number
