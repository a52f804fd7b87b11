"""Regular expressions as data: what `pattern.py` reads and the writers write, with their measures.

The written form is a small dialect that both backends read alike: groups, alternatives, repetitions and classes of code
points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from tensorweave.router.guided import code_points
from tensorweave.router.guided.code_points import Ranges


class PatternError(ValueError):
    """The expression is malformed, or nobody enforces what it asks for."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`most` None: without bound."""

    part: Expression
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Anchor:
    """`^` or `$`."""

    is_start: bool


Expression = Chars | Sequence | Choice | Repeat | Anchor

ANY_CHAR: Final = Chars(code_points.ANY)
ANY_TEXT: Final = Repeat(ANY_CHAR, 0, None)


def literal(text: str) -> Expression:
    return Sequence(tuple(Chars(single_point(ord(char))) for char in text))


def alphabet(expression: Expression) -> Ranges:
    """All characters that the expression names."""
    match expression:
        case Chars(ranges):
            return ranges
        case Repeat(part):
            return alphabet(part)
        case Sequence(parts) | Choice(parts):
            return code_points.union(*map(alphabet, parts))
        case Anchor():
            return ()


def size(expression: Expression) -> int:
    """How many characters it has with all bounded repetitions written out: what an automaton of it grows with."""
    match expression:
        case Chars():
            return 1
        case Repeat(part, least, most):
            return size(part) * max(1, least + 1 if most is None else most)
        case Sequence(parts) | Choice(parts):
            return sum(map(size, parts))
        case Anchor():
            return 0


def shortest(expression: Expression) -> int:
    """Characters of its shortest match."""
    match expression:
        case Chars():
            return 1
        case Repeat(part, least):
            return least * shortest(part)
        case Sequence(parts):
            return sum(map(shortest, parts))
        case Choice(parts):
            return min(map(shortest, parts))
    return 0


def longest(expression: Expression) -> float:
    """Characters of its longest match, or infinity."""
    match expression:
        case Chars():
            return 1
        case Repeat(part, _, most):
            inner = longest(part)
            return 0 if inner == 0 else math.inf if most is None else most * inner
        case Sequence(parts):
            return sum(map(longest, parts))
        case Choice(parts):
            return max(map(longest, parts))
    return 0


def write(expression: Expression) -> str:
    """Write the expression in the dialect of both backends."""
    match expression:
        case Chars(ranges):
            return _write_class(ranges)
        case Sequence(parts):
            return "".join(f"(?:{write(part)})" if isinstance(part, Choice) else write(part) for part in parts)
        case Choice(parts):
            return "|".join(map(write, parts))
        case Repeat(part, 0, most) if most is not None:
            return f"(?:{write(Repeat(part, 1, most))}|)" if most else ""
        case Repeat(part, 1, 1):
            return write(Sequence((part,)))
        case Repeat(part, least, most):
            inner = write(part) if isinstance(part, Chars) else f"(?:{write(part)})"
            return inner + write_count(least, most)
        case Anchor():
            raise AssertionError("anchors are gone by now")


def write_count(least: int, most: int | None) -> str:
    match least, most:
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case _, None:
            return f"{{{least},}}"
    return f"{{{least},{most}}}"


def _write_class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _write_point(ranges[0][0])
    ends = (_write_point(low) if low == high else f"{_write_point(low)}-{_write_point(high)}" for low, high in ranges)
    return f"[{''.join(ends)}]"


def _write_point(point: int) -> str:
    char = chr(point)
    return char if char.isascii() and char.isalnum() else f"\\u{{{point:x}}}"


def single_point(point: int) -> Ranges:
    if 0xD800 <= point <= 0xDFFF or point > 0x10FFFF:
        raise PatternError(f"U+{point:04X} is no character")
    return ((point, point),)
