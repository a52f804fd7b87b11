"""`tensorweave version`: our version and those of what we stand on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import tensorweave

PARTS = ("ray", "torch", "transformers")


def add_command(commands: Any) -> None:
    parser = commands.add_parser("version", help="print versions", description="Print versions.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, version in versions().items():
        print(f"{name} {version}")
    return 0


def versions() -> dict[str, str]:
    parts = {part: _version(part) for part in PARTS}
    return {"tensorweave": tensorweave.__version__, **parts, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
