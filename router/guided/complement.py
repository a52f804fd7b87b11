"""`Complement`: the values that a union of shapes does not allow, as a union of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tensorweave.router.guided.intersect import MAX_EXPANDED, Intersection
from tensorweave.router.guided.refusal import Refusal
from tensorweave.router.guided.shapes import (
    ANYTHING,
    EVERY_TYPE,
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


class Complement:
    """For unions that have all that their schemas allow. What cannot be written as shapes is refused.

    Args:
        resolve: The union of the schema at a pointer.
        sets: Of the same schemas.
    """

    def __init__(self, resolve: Callable[[str], Union], sets: Intersection) -> None:
        self._resolve = resolve
        self._sets = sets
        self._num_expanded = 0

    def of(self, union: Union, keyword: str, at: str) -> Union:
        """`keyword` is why, at the JSON pointer `at`, for errors."""
        outside = ANYTHING
        for shape in union:
            outside = self._sets.of(outside, self._of_shape(shape, keyword, at))
        return outside

    def _of_shape(self, shape: Shape, keyword: str, at: str) -> Union:
        match shape:
            case Anything():
                return ()
            case Reference(pointer):
                return self._of_reference(pointer, keyword, at)
            case Values(values):
                return (Except(values, keyword, at),)
            case Except(values):
                return (Values(values, at),)
        others = tuple(other for other in EVERY_TYPE if type(other) is not type(shape))
        return (*others, *self._within_type(shape, keyword, at))

    def _of_reference(self, pointer: str, keyword: str, at: str) -> Union:
        if self._num_expanded >= MAX_EXPANDED:
            raise Refusal(keyword, at, f"excludes what refers to itself, at {pointer!r}")
        self._num_expanded += 1
        try:
            return self.of(self._resolve(pointer), keyword, at)
        finally:
            self._num_expanded -= 1

    def _within_type(self, shape: Shape, keyword: str, at: str) -> Iterator[Shape]:
        """The other values of the shape's type."""
        match shape:
            case Object(patterns=(), rest=None, least=0, most=None):
                for name in shape.required:
                    yield Object({name: ()})
                for name, union in shape.properties.items():
                    if outside := self.of(union, keyword, at):
                        yield Object({name: outside}, (name,))
            case Text(least, most, ()):
                yield from (Text(low, high) for low, high in _outside(least, most))
            case Array(prefix=(), rest=None):
                yield from (Array(least=low, most=high) for low, high in _outside(shape.least, shape.most))
            case Number(is_integer=False, multiples=()):
                if shape.low is not None:
                    yield Number(high=Bound(shape.low.value, not shape.low.is_open))
                if shape.high is not None:
                    yield Number(low=Bound(shape.high.value, not shape.high.is_open))
            case _:
                raise Refusal(keyword, at, f"excludes a kind of {_NAMES[type(shape)]} that cannot be excluded")


_NAMES: Final[dict[type, str]] = {Object: "object", Array: "array", Text: "string", Number: "number"}


def _outside(least: int, most: int | None) -> Iterator[tuple[int, int | None]]:
    """The ranges of counts outside one range."""
    if least:
        yield 0, least - 1
    if most is not None:
        yield most + 1, None
