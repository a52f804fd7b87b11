"""Keywords that neither library reads, as unions of shapes: negations, conditions, and what arrays contain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from tensorweave.router.guided.complement import Complement
from tensorweave.router.guided.document import step
from tensorweave.router.guided.intersect import Intersection, same_json
from tensorweave.router.guided.refusal import Refusal
from tensorweave.router.guided.shapes import ANYTHING, EVERY_TYPE, Array, Object, Reference, Shape, Union, Values

Fields = Mapping[str, Any]
Read = Callable[[Any, str], Union]

CONDITIONS: Final = frozenset({"not", "if", "dependentRequired", "dependentSchemas", "dependencies", "contains"})

_MAX_PERMUTED: Final = 4
"""So many different items of an array may come in any order: in 65 ways. More come in the schema's order."""
_MAX_UNIQUE: Final = 8
"""Different items of an array: 256 ways in the schema's order."""


class ConditionReader:
    """Args:
    read: Reads a schema below, given its pointer.
    read_all: The same, for all that it allows.
    count: Reads a count. Raises Refusal.
    complement: Of what `read_all` gives.
    """

    def __init__(
        self,
        read: Read,
        read_all: Read,
        count: Callable[[Fields, str, str], int | None],
        sets: Intersection,
        complement: Complement,
    ) -> None:
        self._read = read
        self._read_all = read_all
        self._count = count
        self._sets = sets
        self._complement = complement

    def parts(self, fields: Fields, at: str) -> Iterator[Union]:
        """What each of these keywords allows."""
        if "not" in fields:
            yield self._outside(fields["not"], at, "not")
        if "if" in fields:
            yield self._conditional(fields, at)
        for name in ("dependentRequired", "dependentSchemas", "dependencies"):
            for key, wanted in self._entries(fields, name, at):
                yield self._dependent(key, wanted, at, name)
        if "contains" in fields:
            yield self._containing(fields, at)

    def _outside(self, schema: Any, at: str, keyword: str) -> Union:
        return self._complement.of(self._read_all(schema, step(at, keyword)), keyword, at)

    def _conditional(self, fields: Fields, at: str) -> Union:
        then, otherwise = (
            self._read(fields[name], step(at, name)) if name in fields else ANYTHING for name in ("then", "else")
        )
        if then == otherwise == ANYTHING:
            return ANYTHING
        held = self._sets.of(self._read(fields["if"], step(at, "if")), then)
        return (*held, *self._sets.of(self._outside(fields["if"], at, "if"), otherwise))

    def _entries(self, fields: Fields, name: str, at: str) -> Iterable[tuple[str, Any]]:
        entries = fields.get(name, {})
        if not isinstance(entries, dict):
            raise Refusal(name, at, "must be an object")
        return entries.items()

    def _dependent(self, key: str, wanted: Any, at: str, name: str) -> Union:
        """Without the key, or with it and what it wants: names, or a schema of the whole object."""
        without: tuple[Shape, ...] = tuple(
            Object({key: ()}) if isinstance(each, Object) else each for each in EVERY_TYPE
        )
        having: Union = (Object({}, (key,)),)
        if isinstance(wanted, list) and name != "dependentSchemas":
            if not all(isinstance(each, str) for each in wanted):
                raise Refusal(name, at, "must have lists of names")
            return (*without, Object({}, tuple(dict.fromkeys([key, *wanted]))))
        if name == "dependentRequired" or isinstance(wanted, list):
            raise Refusal(name, at, "must have lists of names" if name == "dependentRequired" else "must have schemas")
        return (*without, *self._sets.of(having, self._read(wanted, step(at, name, key))))

    def _containing(self, fields: Fields, at: str) -> Union:
        """Such items come first. Of a limited number, the others are outside the schema."""
        least, most = self._count(fields, "minContains", at), self._count(fields, "maxContains", at)
        least = 1 if least is None else least
        others = tuple(each for each in EVERY_TYPE if not isinstance(each, Array))
        if most is not None and most < least:
            return others
        item = self._read(fields["contains"], step(at, "contains")) if least else ()
        rest = None if most is None else self._outside(fields["contains"], at, "contains")
        if least and not item:
            return others
        return (*others, Array((item,) * least, rest, least))


def with_unique_items(union: Union, resolve: Callable[[str], Union], at: str) -> Union:
    """A union in which no array has equal items. Raises Refusal where these are not among a few values."""
    return tuple(unique for shape in union for unique in _unique(shape, resolve, at))


def _unique(shape: Shape, resolve: Callable[[str], Union], at: str) -> Union:
    if isinstance(shape, Values):
        kept = tuple(value for value in shape.values if not (isinstance(value, list) and _has_equal(value)))
        return (Values(kept, shape.at),) if kept else ()
    if not isinstance(shape, Array) or _most_items(shape) in (0, 1):
        return (shape,)
    items = None if shape.prefix or shape.rest is None else _finite(shape.rest, resolve)
    if items is None or len(items) > _MAX_UNIQUE:
        reason = f"is enforced for items from a list of at most {_MAX_UNIQUE} values, or with maxItems 1"
        raise Refusal("uniqueItems", at, reason)
    most = len(items) if shape.most is None else min(shape.most, len(items))
    orders = itertools.permutations if len(items) <= _MAX_PERMUTED else itertools.combinations
    arrays = tuple(list(each) for count in range(shape.least, most + 1) for each in orders(items, count))
    return (Values(arrays, at),) if arrays else ()


def _most_items(array: Array) -> int | None:
    if array.rest == ():
        return len(array.prefix) if array.most is None else min(array.most, len(array.prefix))
    return array.most


def _finite(union: Union, resolve: Callable[[str], Union], depth: int = 8) -> list[Any] | None:
    """All values of a union, each once, if these are few."""
    found: list[Any] = []
    for shape in union:
        if isinstance(shape, Reference) and depth:
            inner = _finite(resolve(shape.pointer), resolve, depth - 1)
            if inner is None:
                return None
            found += inner
        elif isinstance(shape, Values):
            found += shape.values
        else:
            return None
    return [value for place, value in enumerate(found) if not any(same_json(value, one) for one in found[:place])]


def _has_equal(items: Sequence[Any]) -> bool:
    return any(same_json(one, other) for place, one in enumerate(items) for other in items[:place])
