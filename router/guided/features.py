"""Which backend enforces what, as data: the result of the experiments that tests/router/guided repeats.

A shape has some of these features; a backend that enforces all features of a schema gets it, xgrammar first, because
it takes a tenth of the time per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from tensorweave.cluster.guide import GUIDE_BACKENDS, GuideBackend
from tensorweave.router.guided.settle import inner_unions
from tensorweave.router.guided.shapes import Bound, Number, Object, Text, Union


@dataclass(frozen=True, slots=True)
class Feature:
    """One of `keywords` in this position or combination, and who enforces it there."""

    keywords: tuple[str, ...]
    where: str
    backends: frozenset[GuideBackend]


_BOTH: Final = frozenset(GUIDE_BACKENDS)
_XGRAMMAR: Final = frozenset[GuideBackend]({"xgrammar"})
_LLGUIDANCE: Final = frozenset[GuideBackend]({"llguidance"})
_NOBODY: Final = frozenset[GuideBackend]()

_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS: Final = ("minProperties", "maxProperties")

FEATURES: Final[dict[str, Feature]] = {
    "length": Feature(("minLength", "maxLength", "propertyNames"), "", _LLGUIDANCE),
    "pattern": Feature(("pattern", "format", "contentEncoding", "propertyNames"), "", _LLGUIDANCE),
    "bounds": Feature(_BOUNDS, "within 15 digits", _BOTH),
    "small bounds": Feature(_BOUNDS, "with more than 6 decimals", _LLGUIDANCE),
    "int64 bounds": Feature(_BOUNDS, "of more than 15 digits", _XGRAMMAR),
    "large bounds": Feature(_BOUNDS, "of more than 15 digits", _NOBODY),
    "multiple": Feature(("multipleOf",), "", _LLGUIDANCE),
    "fine multiple": Feature(("multipleOf",), "with more than 6 decimals", _NOBODY),
    "closed object": Feature(("properties",), "without others", _BOTH),
    "map": Feature(("additionalProperties",), "without properties", _BOTH),
    "open object": Feature(("additionalProperties",), "beside properties", _LLGUIDANCE),
    "key pattern": Feature(("patternProperties", "propertyNames"), "", _LLGUIDANCE),
    "key patterns": Feature(("patternProperties",), "with several expressions", _NOBODY),
    "number of properties": Feature(_COUNTS, "without additional properties", _XGRAMMAR),
    "number of keys": Feature(_COUNTS, "of a map", _BOTH),
    "number of any properties": Feature(_COUNTS, "in this combination", _NOBODY),
}

_MAX_DIGITS: Final = Decimal(10) ** 15
_INT64: Final = 2**63
_MAX_DECIMALS: Final = 6


def features_of(union: Union) -> Iterator[tuple[str, str]]:
    """The features of a union and of all that is in it, each with the JSON pointer of its schema; what the union refers
    to is not followed."""
    for shape in union:
        if isinstance(shape, Text | Number | Object):
            yield from ((name, shape.at) for name in _features(shape))
        for inner in inner_unions(shape):
            yield from features_of(inner)


def _features(shape: Text | Number | Object) -> Iterator[str]:
    match shape:
        case Text():
            return _of_text(shape)
        case Number():
            return _of_number(shape)
    return _of_object(shape)


def _of_text(text: Text) -> Iterator[str]:
    if text.least or text.most is not None:
        yield "length"
    if text.patterns:
        yield "pattern"


def _of_number(number: Number) -> Iterator[str]:
    for bound in (number.low, number.high):
        if bound is not None:
            yield _bound_feature(bound, number.is_integer)
    for multiple in number.multiples:
        yield "multiple" if _num_decimals(multiple) <= _MAX_DECIMALS else "fine multiple"


def _bound_feature(bound: Bound, is_integer: bool) -> str:
    if abs(bound.value) >= _MAX_DIGITS:
        return "int64 bounds" if is_integer and -_INT64 <= bound.value < _INT64 else "large bounds"
    return "bounds" if is_integer or _num_decimals(bound.value) <= _MAX_DECIMALS else "small bounds"


def _num_decimals(value: Decimal) -> int:
    exponent = value.normalize().as_tuple().exponent
    assert isinstance(exponent, int), "JSON has no infinity"
    return max(0, -exponent)


def _of_object(shape: Object) -> Iterator[str]:
    if shape.patterns:
        yield "key pattern"
        if len(shape.patterns) > 1:
            yield "key patterns"
    elif not shape.rest:
        yield "closed object"
    else:
        yield "open object" if shape.properties else "map"
    if shape.least or shape.most is not None:
        yield _count_feature(shape)


def _count_feature(shape: Object) -> str:
    """A name may come twice in a map, so that two keys need not be two properties."""
    if not shape.rest and not shape.patterns:
        return "number of properties"
    is_map = not shape.properties and (not shape.patterns or not shape.rest)
    return "number of keys" if is_map and shape.least <= 1 else "number of any properties"
