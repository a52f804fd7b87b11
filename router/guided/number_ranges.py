"""Numbers within bounds as grammars in xgrammar's EBNF: by digits, without exponents."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Final

from tensorweave.router.guided.intersect import least_integer, most_integer
from tensorweave.router.guided.shapes import Bound, Number

MAX_DIGITS: Final = 15


def number_grammar(number: Number) -> list[str]:
    """The alternatives of a number without multiples. Magnitudes below 10^15, and 15 decimals."""
    return _integers(number) if number.is_integer else _decimals(number)


def _integers(number: Number) -> list[str]:
    low = -(10**MAX_DIGITS) + 1 if number.low is None else least_integer(number.low)
    high = 10**MAX_DIGITS - 1 if number.high is None else most_integer(number.high)
    negative = [f'"-" ({" | ".join(naturals(max(1, -high), -low))})'] if low < 0 else []
    return negative + (naturals(max(0, low), high) if high >= 0 else [])


def naturals(low: int, high: int) -> list[str]:
    """The alternatives of the integers from `low` to `high`, neither negative."""
    found: list[str] = []
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        if least <= most:
            found += _same_length(str(least), str(most))
    return found


def _same_length(low: str, high: str) -> list[str]:
    """Digits from `low` to `high`, which are equally long."""
    if not low:
        return ['""']
    if low == high:
        return [f'"{low}"']
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return [_digit(int(low[0]), int(high[0])) + _digits(rest, rest)]
    if low[0] == high[0]:
        return [f'"{low[0]}" ({" | ".join(_same_length(low[1:], high[1:]))})']
    found = [f'"{low[0]}" ({" | ".join(_same_length(low[1:], "9" * rest))})']
    if int(low[0]) + 1 <= int(high[0]) - 1:
        found.append(_digit(int(low[0]) + 1, int(high[0]) - 1) + _digits(rest, rest))
    return [*found, f'"{high[0]}" ({" | ".join(_same_length("0" * rest, high[1:]))})']


def _digit(low: int, high: int) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _digits(least: int, most: int) -> str:
    return f" [0-9]{{{least},{most}}}" if most else ""


def _decimals(number: Number) -> list[str]:
    limit = Decimal(10) ** MAX_DIGITS
    low = Bound(-limit, is_open=True) if number.low is None else number.low
    high = Bound(limit, is_open=True) if number.high is None else number.high
    found = []
    if low.value < 0:
        nearest = Bound(Decimal(0), is_open=True) if high.value >= 0 else Bound(-high.value, high.is_open)
        found += [f'"-" ({part})' for part in _positive(nearest, Bound(-low.value, low.is_open))]
    if high.value > 0 or (high.value == 0 and not high.is_open):
        found += _positive(low if low.value >= 0 else Bound(Decimal(0)), high)
    return found


def _positive(low: Bound, high: Bound) -> list[str]:
    """The alternatives of decimal numbers between two that are not negative."""
    first, last = math.floor(low.value), math.floor(high.value)
    low_digits, high_digits = _fraction(low.value), _fraction(high.value)
    if first == last:
        return _with(first, _between(low_digits, high_digits, low.is_open, high.is_open))
    found = _with(first, _from(low_digits, low.is_open))
    if first + 1 <= last - 1:
        whole = " | ".join(naturals(first + 1, last - 1))
        found.append(f'({whole}) ("." [0-9]{{1,{MAX_DIGITS}}} | "")')
    return found + _with(last, _up_to(high_digits, high.is_open))


def _with(whole: int, fractions: list[str]) -> list[str]:
    return [f'"{whole}" ({" | ".join(fractions)})'] if fractions else []


def _fraction(value: Decimal) -> str:
    """Its decimals, without zeros at the end."""
    return f"{value % 1:f}".partition(".")[2].rstrip("0")


def _any_after(num_digits: int) -> str:
    return _digits(0, MAX_DIGITS - num_digits)


def _from(digits: str, is_open: bool) -> list[str]:
    """Fractions, with their point, from 0.`digits` upwards; no fraction is 0."""
    found = [] if digits or is_open else ['""']
    tails = _tails_from(digits, 0, is_open)
    return found + [f'"." {tail}' for tail in tails]


def _tails_from(digits: str, place: int, is_open: bool) -> list[str]:
    """Digits from `place` on, at least one, that are not below those of `digits`."""
    if place == len(digits):
        more = [f'"0"{{0,{MAX_DIGITS - place - 1}}} [1-9]{_any_after(place + 1)}']
        return more if is_open else [f"[0-9]{{1,{max(1, MAX_DIGITS - place)}}}"]
    digit, last = int(digits[place]), place + 1 == len(digits)
    found = [_digit(digit + 1, 9) + _any_after(place + 1)] if digit < 9 else []
    rest = _tails_from(digits, place + 1, is_open)
    if last and not is_open:
        rest = [*rest, '""']
    return [*found, f'"{digit}" ({" | ".join(rest)})']


def _up_to(digits: str, is_open: bool) -> list[str]:
    """Fractions, with their point, up to 0.`digits`; no fraction is 0."""
    found = ['""'] if digits or not is_open else []
    return found + [f'"." {tail}' for tail in _tails_to(digits, 0, is_open)]


def _tails_to(digits: str, place: int, is_open: bool) -> list[str]:
    """Digits from `place` on, at least one, that are not above those of `digits`."""
    if place == len(digits):
        return [] if is_open else [f'"0"{{1,{max(1, MAX_DIGITS - place)}}}']
    digit, last = int(digits[place]), place + 1 == len(digits)
    found = [_digit(0, digit - 1) + _any_after(place + 1)] if digit > 0 else []
    rest = _tails_to(digits, place + 1, is_open)
    if not (last and is_open):
        rest = [*rest, '""']  # the digits so far, which are less, or equal at the end
    return [*found, f'"{digit}" ({" | ".join(rest)})'] if rest else found


def _between(low: str, high: str, low_open: bool, high_open: bool) -> list[str]:
    """Fractions between two of one whole number."""
    found = [] if low or low_open or (not high and high_open) else ['""']
    return found + [f'"." {tail}' for tail in _tails_between(low, high, 0, low_open, high_open)]


def _tails_between(low: str, high: str, place: int, low_open: bool, high_open: bool) -> list[str]:
    if place >= len(low) and place >= len(high):
        return [] if low_open or high_open else [f'"0"{{1,{max(1, MAX_DIGITS - place)}}}']
    first = int(low[place]) if place < len(low) else 0
    last = int(high[place]) if place < len(high) else 0
    if first == last:
        rest = _tails_between(low, high, place + 1, low_open, high_open)
        if place + 1 >= len(low) and not low_open and (place + 1 < len(high) or not high_open):
            rest = [*rest, '""']
        return [f'"{first}" ({" | ".join(rest)})'] if rest else []
    found = []
    above = _tails_from(low, place + 1, low_open) if place + 1 <= len(low) else _tails_from("", 0, low_open)
    if place + 1 >= len(low) and not low_open:
        above = [*above, '""']
    found.append(f'"{first}" ({" | ".join(above)})')
    if first + 1 <= last - 1:
        found.append(_digit(first + 1, last - 1) + _any_after(place + 1))
    below = _tails_to(high, place + 1, high_open)
    if place + 1 < len(high) or not high_open:
        below = [*below, '""']
    return [*found, f'"{last}" ({" | ".join(below)})'] if below else found
