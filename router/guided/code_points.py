"""Sets of characters as sorted ranges of code points. Surrogates are in none: UTF-8 cannot express them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Final

Ranges = tuple[tuple[int, int], ...]
"""Sorted, disjoint, both ends included."""

ANY: Final[Ranges] = ((0, 0xD7FF), (0xE000, 0x10FFFF))
LINE_ENDS: Final[Ranges] = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
DIGITS: Final[Ranges] = ((0x30, 0x39),)
WORD: Final[Ranges] = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
ESCAPED_IN_JSON: Final[Ranges] = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
SPACE: Final[Ranges] = ((0x09, 0x0D), (0x20, 0x20))
_UNICODE_SPACE: Final[Ranges] = (
    (0x09, 0x0D),
    (0x1C, 0x20),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
_EMOJI: Final[Ranges] = ((0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x1F680, 0x1F6C5))


def union(*sets: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for ranges in sets for pair in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    kept: list[tuple[int, int]] = []
    for low, high in ranges:
        for gone_low, gone_high in removed:
            if gone_high < low or gone_low > high:
                continue
            if low < gone_low:
                kept.append((low, gone_low - 1))
            low = gone_high + 1
        if low <= high:
            kept.append((low, high))
    return tuple(kept)


def overlap(ranges: Ranges, others: Ranges) -> Ranges:
    return without(ranges, complement(others))


def complement(ranges: Ranges) -> Ranges:
    return without(ANY, ranges)


def not_space() -> Ranges:
    """`\\S`."""
    return complement(_UNICODE_SPACE)


def widest(ranges: Ranges) -> Ranges:
    """What any dialect counts to `\\d`, `\\w` or `\\s`, if `ranges` is one of them; for classes that are negated."""
    narrow: dict[Ranges, Callable[[], Ranges]] = {DIGITS: not_digit, WORD: not_word, SPACE: not_space}
    return complement(narrow[ranges]()) if ranges in narrow else ranges


@functools.cache
def not_digit() -> Ranges:
    """`\\D`, without the decimal digits of other scripts: some validators count those as digits."""
    return _common(lambda char: not char.isdecimal())


@functools.cache
def not_word() -> Ranges:
    """`\\W`, without the letters and digits of other scripts: some validators count those as word characters."""
    return _common(lambda char: not (char.isalnum() or char == "_"))


def _common(test: Callable[[str], bool]) -> Ranges:
    """Code points of the Basic Multilingual Plane, and emoji."""
    points = itertools.chain(range(0xD800), range(0xE000, 0x10000))
    return union(((p, p) for p in points if test(chr(p))), _EMOJI)
