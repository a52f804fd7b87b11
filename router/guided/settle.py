"""`settle`: the shapes that are generated for a schema: what it leaves open is decided, what is impossible is gone.

An object that has properties and says nothing of others gets no others; so do items after a prefix. That is a part of
what the schema allows, and what people mean.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tensorweave.router.guided.expressions import longest, shortest
from tensorweave.router.guided.intersect import excludes_values
from tensorweave.router.guided.refusal import Refusal
from tensorweave.router.guided.shapes import ANYTHING, Array, Except, Object, Reference, Shape, Text, Union

ROOT: Final = ""


@dataclass(frozen=True, slots=True)
class SettledSchema:
    """The union of the root, and by pointer those that are referred to."""

    root: Union
    referred: dict[str, Union]

    def unions(self) -> Iterator[Union]:
        yield self.root
        yield from self.referred.values()


def settle(union_at: Callable[[str], Union], *, closes_objects: bool = False) -> SettledSchema:
    """`closes_objects`: no object gets other properties than it declares. Raises Refusal if no value is valid."""
    if closes_objects:
        union_at = _closing(union_at)
    read = {ROOT: union_at(ROOT)}
    waiting = [read[ROOT]]
    while waiting:
        for pointer in _references(waiting.pop()):
            if pointer not in read:
                read[pointer] = union_at(pointer)
                waiting.append(read[pointer])
    _check_progress(read)
    possible = _possible_pointers(read)
    while True:
        settled = _settled_from_root(read, possible)
        if not settled.root:
            raise Refusal(None, "", "no value is valid under the schema")
        if not (impossible := {pointer for pointer, union in settled.referred.items() if not union}):
            return settled
        possible -= impossible


def _check_progress(read: dict[str, Union]) -> None:
    """A schema may refer to itself from within an object or an array only."""
    direct = {p: {shape.pointer for shape in union if isinstance(shape, Reference)} for p, union in read.items()}
    try:
        graphlib.TopologicalSorter(direct).prepare()
    except graphlib.CycleError as error:
        raise Refusal("$ref", error.args[1][0], "refers to itself without an object or an array between") from None


def _settled_from_root(read: dict[str, Union], possible: set[str]) -> SettledSchema:
    root = _settled(read[ROOT], possible)
    referred: dict[str, Union] = {}
    waiting = [root]
    while waiting:
        for pointer in _references(waiting.pop()):
            if pointer not in referred:
                referred[pointer] = _settled(read[pointer], possible)
                waiting.append(referred[pointer])
    return SettledSchema(root, referred)


def _references(union: Union) -> Iterator[str]:
    for shape in union:
        if isinstance(shape, Reference):
            yield shape.pointer
        for inner in inner_unions(shape):
            yield from _references(inner)


def inner_unions(shape: Shape) -> Iterator[Union]:
    """The unions among its items or properties."""
    if isinstance(shape, Array):
        yield from shape.prefix
    elif isinstance(shape, Object):
        yield from shape.properties.values()
        yield from (union for _, union in shape.patterns)
    if isinstance(shape, Array | Object) and shape.rest:
        yield shape.rest


def _possible_pointers(read: dict[str, Union]) -> set[str]:
    """The pointers for which a finite value exists: the least fixed point."""
    possible: set[str] = set()
    while found := {p for p, union in read.items() if p not in possible and _is_possible(union, possible)}:
        possible |= found
    return possible


def _is_possible(union: Union, possible: set[str]) -> bool:
    return any(_is_shape_possible(shape, possible) for shape in union)


def _is_shape_possible(shape: Shape, possible: set[str]) -> bool:
    match shape:
        case Reference(pointer):
            return pointer in possible
        case Array():
            rest = ANYTHING if shape.rest is None else shape.rest
            has_rest = shape.least <= len(shape.prefix) or _is_possible(rest, possible)
            return has_rest and all(_is_possible(item, possible) for item in shape.prefix[: shape.least])
        case Object():
            rest = ANYTHING if shape.rest is None else shape.rest
            return all(_is_possible(shape.properties.get(name, rest), possible) for name in shape.required)
    return True


def _settled(union: Union, possible: set[str]) -> Union:
    return tuple(
        settled for shape in union if _is_shape_possible(shape, possible) for settled in _settled_shape(shape, possible)
    )


def _settled_shape(shape: Shape, possible: set[str]) -> Union:
    match shape:
        case Array():
            return _settled_array(shape, possible)
        case Object():
            return _settled_object(shape, possible)
        case Text():
            return _settled_text(shape)
        case Except():
            raise excludes_values(shape)
    return (shape,)


def _settled_text(text: Text) -> Union:
    """Without a length that every match of an expression has."""
    lengths = [(shortest(expression), longest(expression)) for expression in text.patterns]
    if any(most < text.least or (text.most is not None and least > text.most) for least, most in lengths):
        return ()
    has_least = any(least >= text.least for least, _ in lengths)
    has_most = text.most is not None and any(most <= text.most for _, most in lengths)
    return (replace(text, least=0 if has_least else text.least, most=None if has_most else text.most),)


def _settled_array(array: Array, possible: set[str]) -> Union:
    prefix: list[Union] = []
    for item in array.prefix[: array.most]:
        if not (settled := _settled(item, possible)):
            break
        prefix.append(settled)
    if len(prefix) < len(array.prefix):  # an item is impossible, or beyond maxItems
        rest: Union = ()
    elif array.rest is None:
        rest = () if prefix and array.least <= len(prefix) else ANYTHING
    else:
        rest = _settled(array.rest, possible)
    most = array.most if rest else min(len(prefix), len(prefix) if array.most is None else array.most)
    if most is not None and array.least > most:
        return ()
    return (Array(tuple(prefix), rest, array.least, most),)


def _settled_object(shape: Object, possible: set[str]) -> Union:
    undeclared = [name for name in shape.required if name not in shape.properties]
    if undeclared and shape.patterns:
        raise Refusal("required", "", f"names {undeclared[0]!r}, which is not in properties, beside patternProperties")
    rest = ANYTHING if shape.rest is None else _settled(shape.rest, possible)
    properties = {name: _settled(union, possible) for name, union in shape.properties.items()}
    properties |= dict.fromkeys(undeclared, rest)
    if not all(properties[name] for name in shape.required):
        return ()
    if shape.rest is None and (properties or shape.patterns):
        rest = ()
    if rest and not all(properties.values()):
        raise Refusal("properties", "", "with a property that no value fits is not enforced beside additional ones")
    kept = {name: union for name, union in properties.items() if union}
    patterns = tuple((key, settled) for key, union in shape.patterns if (settled := _settled(union, possible)))
    if len(patterns) < len(shape.patterns) and (rest or patterns or kept):
        raise Refusal("patternProperties", "", "that no value fits is not enforced beside other properties")
    if not rest and not patterns:
        most = len(kept) if shape.most is None else min(shape.most, len(kept))
        if max(shape.least, len(shape.required)) > most:
            return ()
        shape = replace(shape, most=None if most >= len(kept) else most)
    least = shape.least if shape.least > len(shape.required) else 0
    return (replace(shape, properties=kept, patterns=patterns, rest=rest, least=least),)


def _closing(union_at: Callable[[str], Union]) -> Callable[[str], Union]:
    return lambda pointer: _without_additional(union_at(pointer))


def _without_additional(union: Union) -> Union:
    return tuple(_closed(shape) for shape in union)


def _closed(shape: Shape) -> Shape:
    """Return the shape with all objects closed that declare properties."""
    match shape:
        case Array():
            rest = None if shape.rest is None else _without_additional(shape.rest)
            return replace(shape, prefix=tuple(map(_without_additional, shape.prefix)), rest=rest)
        case Object():
            properties = {name: _without_additional(union) for name, union in shape.properties.items()}
            patterns = tuple((name, _without_additional(union)) for name, union in shape.patterns)
            rest = None if shape.rest is None else () if properties or patterns else _without_additional(shape.rest)
            return replace(shape, properties=properties, patterns=patterns, rest=rest)
    return shape
