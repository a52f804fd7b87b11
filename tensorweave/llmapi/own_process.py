"""`OwnProcess`: the process that an object belongs to. A forked child has a copy of the object, but none of the threads
that serve it."""

from __future__ import annotations

import os


class OwnProcess:
    """`what` names the object in errors."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises RuntimeError in a forked child."""
        if not self.is_this:
            raise RuntimeError(
                f"{self._what} belongs to process {self._pid} and cannot be used in process {os.getpid()}, which was "
                "forked from it: make an LLM of its own there, after the fork, or send it the finished results"
            )
