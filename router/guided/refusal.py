"""`Refusal`: why a schema, an expression or a grammar cannot be enforced. `guide.py` makes a RequestRejected of it."""

from __future__ import annotations


class Refusal(Exception):
    """Names the keyword and where it stands.

    Args:
        keyword: The keyword; None: the whole schema is meant.
        pointer: JSON pointer of the schema that has it.
        reason: Goes on after the keyword's name, or stands alone.
    """

    def __init__(self, keyword: str | None, pointer: str, reason: str) -> None:
        super().__init__(reason)
        self.keyword = keyword
        self.pointer = pointer
        self.reason = reason

    @property
    def message(self) -> str:
        place = f" at {self.pointer[:200]!r}" if self.pointer else ""
        return f"{self.keyword!r}{place} {self.reason}" if self.keyword else f"{self.reason}{place}"


class TooComplex(Refusal):
    """Reading the schema further would take too long."""


def not_enforced(keyword: str, pointer: str, remedy: str | None = None) -> Refusal:
    """For a keyword that no backend enforces."""
    return Refusal(keyword, pointer, "is not enforced by any backend" + (f"; {remedy}" if remedy else ""))
