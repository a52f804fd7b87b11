"""Where the part of a compilation runs that takes long and does not need the interpreter: `Run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = Callable[[Callable[[], Any]], Any]
"""Calls a function and returns its result, or raises its error."""


def run_here(function: Callable[[], Any]) -> Any:
    return function()
