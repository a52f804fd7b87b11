"""`Intersection`: the values that two unions of shapes both allow, as a union of shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from tensorweave.router.guided.refusal import Refusal, TooComplex
from tensorweave.router.guided.shapes import (
    ANYTHING,
    Anything,
    Array,
    Bound,
    Except,
    Number,
    Object,
    Reference,
    Shape,
    Text,
    Union,
    Values,
)

_VALUES_PER_SHAPE: Final = 16
"""Values that take as long as a pair of other shapes."""
MAX_EXPANDED: Final = 24
"""References inside one another that are gone through; deeper, the schema is probably recursive."""


class Intersection:
    """Args:
    resolve: The union of the schema at a pointer.
    spend: Called for each pair of shapes, with what it costs; raises TooComplex when that was too much.
    """

    def __init__(self, resolve: Callable[[str], Union], spend: Callable[[int], None]) -> None:
        self._resolve = resolve
        self._spend = spend
        self._num_expanded = 0

    def of(self, left: Union, right: Union) -> Union:
        if left == ANYTHING or right == ANYTHING:
            return right if left == ANYTHING else left
        return tuple(shape for a in left for b in right for shape in self._pair(a, b))

    def are_disjoint(self, left: Union, right: Union) -> bool:
        """Whether no value that is generated for one is valid for the other. False if that is not known."""
        try:
            return not self.of(_as_written(left), right) and not self.of(left, _as_written(right))
        except TooComplex:
            raise
        except Refusal:
            return False

    def _pair(self, left: Shape, right: Shape) -> Union:
        self._spend(1)
        match left, right:
            case (Anything(), other) | (other, Anything()):
                return (other,)
            case Reference(pointer), Reference(same) if pointer == same:
                return (left,)
            case Reference(pointer), _:
                return self._expanded(pointer, right)
            case _, Reference(pointer):
                return self._expanded(pointer, left)
            case Values(values, at), Values(others):
                self._spend((len(values) + len(others)) // _VALUES_PER_SHAPE)
                return _values(_common(values, others), at)
            case (Except(values, keyword, at), Except(others)):
                return (Except(values + others, keyword, at),)
            case (Values(values, at), Except(others)) | (Except(others), Values(values, at)):
                self._spend((len(values) + len(others)) // _VALUES_PER_SHAPE)
                return _values(_others(values, others), at)
            case (Except(), other) | (other, Except()):
                return _without(other, left if isinstance(left, Except) else right)
            case (Values(values, at), other) | (other, Values(values, at)):
                self._spend(len(values) // _VALUES_PER_SHAPE)
                return _values((value for value in values if _allows(other, value)), at)
            case Text(), Text():
                return _texts(left, right)
            case Number(), Number():
                return _numbers(left, right)
            case Array(), Array():
                return self._arrays(left, right)
            case Object(), Object():
                return self._objects(left, right)
        return ()

    def _expanded(self, pointer: str, other: Shape) -> Union:
        if self._num_expanded >= MAX_EXPANDED:
            raise Refusal("$ref", pointer, "is combined with another schema of which it is a part")
        self._num_expanded += 1
        try:
            return self.of(self._resolve(pointer), (other,))
        finally:
            self._num_expanded -= 1

    def _arrays(self, left: Array, right: Array) -> Union:
        prefix, most = [], _least_of(left.most, right.most)
        for place in range(max(len(left.prefix), len(right.prefix))):
            item = self.of(_item(left, place), _item(right, place))
            if not item:
                most = _least_of(most, place)
                break
            prefix.append(item)
        least = max(left.least, right.least)
        if most is not None and least > most:
            return ()
        return (Array(tuple(prefix), self._rest(left.rest, right.rest), least, most),)

    def _objects(self, left: Object, right: Object) -> Union:
        for one, other in ((left, right), (right, left)):
            if one.patterns and (other.rest is not None or other.patterns):
                raise Refusal("patternProperties", "", "is not supported in combination with another schema")
        required = tuple(dict.fromkeys(left.required + right.required))
        rest = self._rest(left.rest, right.rest)
        properties = {}
        for name in dict.fromkeys([*left.properties, *right.properties]):
            value = self.of(_property(left, name), _property(right, name))
            if not value and name in required:
                return ()
            properties[name] = value
        least, most = max(left.least, right.least), _least_of(left.most, right.most)
        if (most is not None and max(least, len(required)) > most) or (
            rest == () and set(required) - properties.keys()
        ):
            return ()
        patterns = left.patterns + right.patterns
        return (Object(properties, required, patterns, rest, least, most, left.at or right.at),)

    def _rest(self, left: Union | None, right: Union | None) -> Union | None:
        if left is None or right is None:
            return right if left is None else left
        return self.of(left, right)


def same_json(left: Any, right: Any) -> bool:
    """Equality as JSON has it: 1 is 1.0, but not true."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(value, right[key]) for key, value in left.items())
    return type(left) is type(right) and left == right if not _is_number(left) else _is_number(right) and left == right


def _common(values: tuple[Any, ...], others: tuple[Any, ...]) -> Iterable[Any]:
    """The values that are among `others`."""
    scalars = {(isinstance(other, bool), other) for other in others if not isinstance(other, list | dict)}
    nested = [other for other in others if isinstance(other, list | dict)]
    for value in values:
        if not isinstance(value, list | dict):
            if (isinstance(value, bool), value) in scalars:
                yield value
        elif any(same_json(value, other) for other in nested):
            yield value


def _others(values: tuple[Any, ...], excluded: tuple[Any, ...]) -> Iterable[Any]:
    """The values that are not among `excluded`."""
    return (value for value in values if not any(same_json(value, other) for other in excluded))


def _without(shape: Shape, excluded: Shape) -> Union:
    """A shape that has none of the excluded values anyway. Raises Refusal for others."""
    assert isinstance(excluded, Except)
    if any(_allows(shape, value) for value in excluded.values):
        raise excludes_values(excluded)
    return (shape,)


def excludes_values(excluded: Except) -> Refusal:
    reason = "excludes single values, which is enforced beside enum and const only"
    return Refusal(excluded.keyword, excluded.at, reason)


def number_is_empty(number: Number) -> bool:
    """Whether its bounds leave no value."""
    low, high = number.low, number.high
    if low is None or high is None:
        return False
    if number.is_integer:
        return least_integer(low) > most_integer(high)
    return low.value > high.value or (low.value == high.value and (low.is_open or high.is_open))


def least_integer(low: Bound) -> int:
    whole = math.ceil(low.value)
    return whole + 1 if low.is_open and whole == low.value else whole


def most_integer(high: Bound) -> int:
    whole = math.floor(high.value)
    return whole - 1 if high.is_open and whole == high.value else whole


def _as_written(union: Union) -> Union:
    """Close the objects that the schema leaves open only by not saying so, as `write.py` does."""
    return tuple(
        replace(s, rest=())
        if isinstance(s, Object) and s.rest is None and s.properties and set(s.required) <= s.properties.keys()
        else s
        for s in union
    )


def _values(values: Iterable[Any], at: str) -> Union:
    kept = tuple(values)
    return (Values(kept, at),) if kept else ()


def _allows(shape: Shape, value: Any) -> bool:
    match shape:
        case Text(least, most, patterns):
            if not isinstance(value, str):
                return False
            if patterns:
                raise Refusal("pattern", "", "and 'format' are not supported beside 'enum' and 'const'")
            return least <= len(value) and (most is None or len(value) <= most)
        case Number():
            return _is_number(value) and _number_allows(shape, Decimal(str(value)))
        case Array() | Object():
            if not isinstance(value, list if isinstance(shape, Array) else dict):
                return False
            if shape != type(shape)():
                raise Refusal("enum", "", "with arrays or objects is not supported beside other keywords")
            return True
    raise AssertionError(f"{shape} beside values")


def _number_allows(number: Number, value: Decimal) -> bool:
    low, high = number.low, number.high
    if number.is_integer and value != value.to_integral_value():
        return False
    if low is not None and (value < low.value or (low.is_open and value == low.value)):
        return False
    if high is not None and (value > high.value or (high.is_open and value == high.value)):
        return False
    return all((Fraction(value) / Fraction(multiple)).denominator == 1 for multiple in number.multiples)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(left: Text, right: Text) -> Union:
    least, most = max(left.least, right.least), _least_of(left.most, right.most)
    if most is not None and least > most:
        return ()
    patterns = left.patterns + tuple(pattern for pattern in right.patterns if pattern not in left.patterns)
    return (Text(least, most, patterns, left.at or right.at),)


def _numbers(left: Number, right: Number) -> Union:
    lows = [bound for bound in (left.low, right.low) if bound is not None]
    highs = [bound for bound in (left.high, right.high) if bound is not None]
    multiples = left.multiples + tuple(m for m in right.multiples if m not in left.multiples)
    merged = Number(
        left.is_integer or right.is_integer,
        max(lows, key=lambda bound: (bound.value, bound.is_open), default=None),
        min(highs, key=lambda bound: (bound.value, not bound.is_open), default=None),
        multiples,
        left.at or right.at,
    )
    return () if number_is_empty(merged) else (merged,)


def _item(array: Array, place: int) -> Union:
    if place < len(array.prefix):
        return array.prefix[place]
    return ANYTHING if array.rest is None else array.rest


def _property(shape: Object, name: str) -> Union:
    if name in shape.properties:
        return shape.properties[name]
    if shape.patterns:
        raise Refusal("patternProperties", "", "is not supported in combination with another schema")
    return ANYTHING if shape.rest is None else shape.rest


def _least_of(left: int | None, right: int | None) -> int | None:
    return min((bound for bound in (left, right) if bound is not None), default=None)
