"""Which form of a guide enforces what, as data: the result of the experiments that tests/router/guided repeats.

A schema has some of these features; the first form that enforces all of them is used. Per token of SmolLM2's vocabulary
(49,152), on one core of an EPYC, xgrammar takes 10 to 20 µs, but 25 ms within a string of bounded length and up to 70
ms within a URI; llguidance takes 20 to 100 µs, at times 8 ms. So what xgrammar does not read itself goes to llguidance,
except where only xgrammar can be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal

from tensorweave.cluster.guide import BackendChoice
from tensorweave.router.guided import code_points
from tensorweave.router.guided.expressions import Chars, Choice, Expression, Repeat, alphabet, size
from tensorweave.router.guided.expressions import Sequence as Parts
from tensorweave.router.guided.settle import inner_unions
from tensorweave.router.guided.shapes import Bound, Number, Object, Text, Union, Values

Form = Literal["schema", "grammar", "llguidance"]
"""A schema for xgrammar, our own grammar for xgrammar (`ebnf.py`), a schema for llguidance."""

FORMS: Final[dict[BackendChoice, tuple[Form, ...]]] = {
    "auto": ("schema", "llguidance"),
    "xgrammar": ("schema",),
    "llguidance": ("llguidance",),
}
"""The forms that each backend of a configuration allows, in the order of preference."""
XGRAMMAR_FORMS: Final[tuple[Form, ...]] = ("schema", "grammar")
"""Where a grammar of ours can be used: in structural tags, and by callers that say so."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One of `keywords` in this position or combination, and the forms that enforce it there."""

    keywords: tuple[str, ...]
    where: str
    forms: frozenset[Form]


_ALL: Final = frozenset[Form]({"schema", "grammar", "llguidance"})
_NOT_SCHEMA: Final = frozenset[Form]({"grammar", "llguidance"})
_SCHEMA: Final = frozenset[Form]({"schema"})
_LLGUIDANCE: Final = frozenset[Form]({"llguidance"})
_NOBODY: Final = frozenset[Form]()

_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS: Final = ("minProperties", "maxProperties")

_STRINGS: Final = ("pattern", "format", "contentEncoding", "minLength", "maxLength", "propertyNames")

FEATURES: Final[dict[str, Feature]] = {
    "small minLength": Feature(("minLength", "propertyNames"), "up to 2", _NOT_SCHEMA),
    "length": Feature(("minLength", "maxLength", "propertyNames"), "", _LLGUIDANCE),
    "pattern": Feature(_STRINGS, "", _NOT_SCHEMA),
    "heavy pattern": Feature(_STRINGS, "of this size, or that quotes, backslashes or line ends match", _LLGUIDANCE),
    "several": Feature(_STRINGS, "beside another keyword of these", _LLGUIDANCE),
    "control characters": Feature(
        ("enum", "const", "properties", "required"), "with control characters", frozenset({"schema", "grammar"})
    ),
    "bounds": Feature(_BOUNDS, "within 15 digits", _ALL),
    "small bounds": Feature(_BOUNDS, "with more than 6 decimals", _NOT_SCHEMA),
    "int64 bounds": Feature(_BOUNDS, "of more than 15 digits", _SCHEMA),
    "large bounds": Feature(_BOUNDS, "of more than 15 digits, or 12 decimals", _NOBODY),
    "multiple": Feature(("multipleOf",), "", _LLGUIDANCE),
    "unusual multiple": Feature(("multipleOf",), "of 10^9 and more, or with more than 6 decimals,", _NOBODY),
    "closed object": Feature(("properties",), "without others", _ALL),
    "map": Feature(("additionalProperties",), "without properties", _ALL),
    "open object": Feature(("additionalProperties",), "beside properties", _NOT_SCHEMA),
    "long names": Feature(
        ("additionalProperties",), "beside names of more than 128 characters, or 2000 together,", _LLGUIDANCE
    ),
    "key pattern": Feature(("patternProperties", "propertyNames"), "", _NOT_SCHEMA),
    "key pattern and others": Feature(("patternProperties", "propertyNames"), "of this kind", _LLGUIDANCE),
    "key patterns": Feature(("patternProperties",), "with several expressions", _NOBODY),
    "number of properties": Feature(_COUNTS, "without additional properties", _SCHEMA),
    "number of keys": Feature(_COUNTS, "of a map", _ALL),
    "number of any properties": Feature(_COUNTS, "in this combination", _NOBODY),
}

_MAX_DIGITS: Final = Decimal(10) ** 15
_INT64: Final = 2**63
_SMALL_LENGTH: Final = 2
_MAX_LIGHT_SIZE: Final = 200
_MAX_LIGHT_REPEATS: Final = 8
_MAX_DECIMALS: Final = 6
_MAX_MULTIPLE: Final = 10**9
_MAX_GRAMMAR_DECIMALS: Final = 12
_MAX_NAME_CHARS: Final = 128
_MAX_ALL_NAMES_CHARS: Final = 2000
"""Of properties beside which others are possible: each character is a rule of a grammar."""


def features_of(union: Union) -> Iterator[tuple[str, str]]:
    """The features of a union and of all that is in it, each with the JSON pointer of its schema; what the union refers
    to is not followed."""
    for shape in union:
        if isinstance(shape, Text | Number | Object | Values):
            yield from ((name, shape.at) for name in _features(shape))
        for inner in inner_unions(shape):
            yield from features_of(inner)


def _features(shape: Text | Number | Object | Values) -> Iterator[str]:
    match shape:
        case Values():
            return iter(["control characters"] if _has_controls(shape.values) else [])
        case Text():
            return _of_text(shape)
        case Number():
            return _of_number(shape)
    return _of_object(shape)


def _has_controls(value: Any) -> bool:
    """Characters that JSON writes with \\u, which llguidance leaves out if it may not write \\u."""
    match value:
        case str():
            return any((char < " " and char not in "\b\f\n\r\t") or char == "\x7f" for char in value)
        case list() | tuple():
            return any(map(_has_controls, value))
        case dict():
            return _has_controls([*value, *value.values()])
    return False


def _of_text(text: Text) -> Iterator[str]:
    has_length = text.least > 0 or text.most is not None
    if len(text.patterns) > 1 or (text.patterns and has_length):
        yield "several"
    elif text.patterns:
        yield "heavy pattern" if _is_heavy(text.patterns[0]) else "pattern"
    elif has_length:
        yield "small minLength" if text.most is None and text.least <= _SMALL_LENGTH else "length"


def _is_heavy(expression: Expression) -> bool:
    """Whether xgrammar may take more than 10 ms per token for it, in a grammar of ours."""
    has_escapes = code_points.overlap(alphabet(expression), code_points.ESCAPED_IN_JSON)
    return bool(has_escapes) or size(expression) > _MAX_LIGHT_SIZE or _has_long_repeats(expression)


def _has_long_repeats(expression: Expression) -> bool:
    match expression:
        case Repeat(part, _, most):
            is_long = not isinstance(part, Chars) and most is not None and most > _MAX_LIGHT_REPEATS
            return is_long or _has_long_repeats(part)
        case Parts(parts) | Choice(parts):
            return any(map(_has_long_repeats, parts))
    return False


def _of_number(number: Number) -> Iterator[str]:
    for bound in (number.low, number.high):
        if bound is not None:
            yield _bound_feature(bound, number.is_integer)
    for multiple in number.multiples:
        is_usual = _num_decimals(multiple) <= _MAX_DECIMALS and multiple < _MAX_MULTIPLE
        yield "multiple" if is_usual else "unusual multiple"


def _bound_feature(bound: Bound, is_integer: bool) -> str:
    if abs(bound.value) >= _MAX_DIGITS:
        return "int64 bounds" if is_integer and -_INT64 <= bound.value < _INT64 else "large bounds"
    num_decimals = 0 if is_integer else _num_decimals(bound.value)
    if num_decimals > _MAX_GRAMMAR_DECIMALS:
        return "large bounds"
    return "bounds" if num_decimals <= _MAX_DECIMALS else "small bounds"


def _num_decimals(value: Decimal) -> int:
    exponent = value.normalize().as_tuple().exponent
    assert isinstance(exponent, int), "JSON has no infinity"
    return max(0, -exponent)


def _of_object(shape: Object) -> Iterator[str]:
    if _has_controls(list(shape.properties)):
        yield "control characters"
    if shape.patterns:
        is_alone = not shape.properties and not shape.rest and not _is_heavy(shape.patterns[0][0])
        yield "key pattern" if is_alone else "key pattern and others"
        if len(shape.patterns) > 1:
            yield "key patterns"
    elif not shape.rest:
        yield "closed object"
    else:
        yield "open object" if shape.properties else "map"
        lengths = list(map(len, shape.properties))
        if max(lengths, default=0) > _MAX_NAME_CHARS or sum(lengths) > _MAX_ALL_NAMES_CHARS:
            yield "long names"
    if shape.least or shape.most is not None:
        yield _count_feature(shape)


def _count_feature(shape: Object) -> str:
    """A name may come twice in a map, so that two keys need not be two properties."""
    if not shape.rest and not shape.patterns:
        return "number of properties"
    is_map = not shape.properties and (not shape.patterns or not shape.rest)
    return "number of keys" if is_map and shape.least <= 1 else "number of any properties"
