"""`WatchedGrammar`: what compiled grammars of both libraries have in common."""

from __future__ import annotations

from collections.abc import Callable


class WatchedGrammar:
    """`on_slow` is set on rank 0, `problem` by the step loop of every rank."""

    problem = ""

    def __init__(self) -> None:
        self.on_slow: Callable[[], None] | None = None

    def report_slow(self) -> None:
        on_slow, self.on_slow = self.on_slow, None
        if on_slow is not None:
            on_slow()
