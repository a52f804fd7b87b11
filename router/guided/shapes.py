"""`Shape`: what values of one type a schema allows. A schema is read to a union of shapes.

What a schema says by allOf, $ref with siblings, lists of types, enum beside type and so on is gone in this form: there
are few kinds of shapes, each with few fields, and the table in `features.py` says who enforces which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tensorweave.router.guided.expressions import Expression


@dataclass(frozen=True, slots=True)
class Anything:
    """Any JSON value."""


@dataclass(frozen=True, slots=True)
class Values:
    """One of these values. `boolean` is true and false, `null` is null."""

    values: tuple[Any, ...]
    at: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Except:
    """Any JSON value but these, because of the `keyword` at `at`; only in combination with shapes that leave a list of
    values, or other types."""

    values: tuple[Any, ...]
    keyword: str = field(default="", compare=False)
    at: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A string that matches all of `patterns`. `at`, here and below: JSON pointer of the schema, for errors."""

    least: int = 0
    most: int | None = None
    patterns: tuple[Expression, ...] = ()
    at: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Bound:
    value: Decimal
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Number:
    is_integer: bool = False
    low: Bound | None = None
    high: Bound | None = None
    multiples: tuple[Decimal, ...] = ()
    at: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Array:
    """`rest`: what follows the prefix; None: the schema does not say."""

    prefix: tuple[Union, ...] = ()
    rest: Union | None = None
    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Object:
    """`rest`: the values of other names than `properties` and `patterns` have; None: the schema does not say."""

    properties: Mapping[str, Union] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    patterns: tuple[tuple[Expression, Union], ...] = ()
    rest: Union | None = None
    least: int = 0
    most: int | None = None
    at: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the schema at a JSON pointer allows."""

    pointer: str


Shape = Anything | Values | Except | Text | Number | Array | Object | Reference
Union = tuple[Shape, ...]
"""No shape: no value."""

ANYTHING: Union = (Anything(),)
"""Written as {} or true."""

EVERY_TYPE: Union = (Object(), Array(), Text(), Number(), Values((True, False, None)))
"""The same, type by type: for keywords that restrict one of them."""
