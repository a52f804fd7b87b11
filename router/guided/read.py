"""`read_schema`: a JSON schema to the union of shapes that it allows. Every keyword is read or refused by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from tensorweave.router.guided.complement import Complement
from tensorweave.router.guided.conditions import CONDITIONS, ConditionReader, with_unique_items
from tensorweave.router.guided.document import Schema, SchemaDocument, as_schema, step
from tensorweave.router.guided.families import FamilyReader, count
from tensorweave.router.guided.intersect import Intersection, number_is_empty
from tensorweave.router.guided.keywords import ANNOTATIONS, FAMILIES, KNOWN, NEUTRAL, REMEDIES, TYPES
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.refusal import Refusal, TooComplex, not_enforced
from tensorweave.router.guided.shapes import (
    ANYTHING,
    EVERY_TYPE,
    Array,
    Number,
    Object,
    Reference,
    Shape,
    Union,
    Values,
)

_COMPOSED: Final = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")


class SchemaReader:
    """Reads one document. `union_at` gives the union of the schema at a pointer, each read once.

    Where `type` is left out, `properties` means an object, `minimum` a number and so on: that is a part of what the
    schema allows, and what people mean. `is_exact`: all of what it allows.
    """

    def __init__(self, document: SchemaDocument, limits: GuidedLimits, *, is_exact: bool = False) -> None:
        self._document = document
        self._limits = limits
        self._is_exact = is_exact
        self._num_shapes = 0
        self._read_at: dict[str, Union] = {}
        self._reading: list[str] = []
        self._sets = Intersection(self.union_at, self._spend)
        self._families = FamilyReader(self._read, limits.max_pattern_size)

    def union_at(self, pointer: str) -> Union:
        if pointer not in self._read_at:
            if pointer in self._reading:
                raise Refusal("$ref", pointer, "refers to itself")
            self._reading.append(pointer)
            self._read_at[pointer] = self._read(self._document.schema_at(pointer, pointer), pointer)
            self._reading.pop()
        return self._read_at[pointer]

    def _read(self, schema: Any, at: str) -> Union:
        fields = as_schema(schema, at)
        if isinstance(fields, bool):
            return ANYTHING if fields else ()
        self._spend()
        self._check_keywords(fields, at)
        try:
            union = ANYTHING
            for part in self._parts(fields, at):
                union = self._sets.of(union, part)
        except TooComplex:
            raise
        except Refusal as refusal:
            if refusal.pointer:
                raise
            raise Refusal(refusal.keyword, at, refusal.reason) from None
        return self._closed(union, fields, at)

    def _parts(self, fields: dict[str, Any], at: str) -> Iterable[Union]:
        """What each keyword, or group of keywords, allows."""
        yield self._own(fields, at)
        if "const" in fields:
            yield (Values((fields["const"],), at),)
        if "enum" in fields:
            if not isinstance(fields["enum"], list):
                raise Refusal("enum", at, "must be a list")
            yield (Values(tuple(fields["enum"]), at),) if fields["enum"] else ()
        if "$ref" in fields:
            yield (self._reference(fields["$ref"], at),)
        for i, schema in enumerate(self._list_of(fields, "allOf", at)):
            yield self._read(schema, step(at, "allOf", i))
        for name in ("anyOf", "oneOf"):
            if name in fields:
                if name == "oneOf":
                    self._exact.check_disjoint(fields, at)
                yield _one_of(self._branches(fields, name, at))
        for name in CONDITIONS & fields.keys():
            if self._document.has_unevaluated:
                raise Refusal(name, at, "is not supported with unevaluatedProperties and unevaluatedItems")
            if self._is_exact and name == "contains":
                raise Refusal(name, at, "is not supported within not, if and oneOf")
        yield from self._conditions.parts(fields, at)

    def _reference(self, reference: Any, at: str) -> Reference:
        pointer = self._document.pointer_of(reference, at)
        self._document.schema_at(pointer, at)
        return Reference(pointer)

    def _own(self, fields: dict[str, Any], at: str) -> Union:
        """What `type` and the keywords of single types allow."""
        given = {name for name, family in FAMILIES.items() if family & fields.keys()}
        types = self._types(fields, at)
        if types is None:
            if not given:
                return ANYTHING
            is_any = self._is_exact or any(name in fields for name in _COMPOSED)
            types = list(TYPES) if is_any else [name for name in TYPES if name in given]
        if "number" in types and "integer" in types:
            types.remove("integer")
        shapes = [self._shape(name, fields, at) for name in types]
        return tuple(shape for shape in shapes if not (isinstance(shape, Number) and number_is_empty(shape)))

    def _types(self, fields: dict[str, Any], at: str) -> list[str] | None:
        if "type" not in fields:
            return None
        types = fields["type"] if isinstance(fields["type"], list) else [fields["type"]]
        for name in types:
            if name not in TYPES:
                raise Refusal("type", at, f"is {str(name)[:64]!r}, not one of {', '.join(TYPES)}")
        return list(dict.fromkeys(types))

    def _shape(self, type_name: str, fields: dict[str, Any], at: str) -> Shape:
        match type_name:
            case "object":
                has_names = "propertyNames" in fields and "additionalProperties" not in fields
                if has_names and self._document.has_unevaluated:
                    raise Refusal("propertyNames", at, "needs additionalProperties, with unevaluatedProperties")
                return self._families.object(fields, at)
            case "array":
                return self._families.array(fields, at)
            case "string":
                return self._families.text(fields, at)
            case "boolean":
                return Values((True, False))
            case "null":
                return Values((None,))
        return self._families.number(fields, at, is_integer=type_name == "integer")

    def _check_keywords(self, fields: dict[str, Any], at: str) -> None:
        for name, value in fields.items():
            if name in NEUTRAL:
                if not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name]):
                    raise not_enforced(name, at, REMEDIES.get(name))
            elif name == "$id" and at:
                raise Refusal(name, at, "is supported at the root only")
            elif name not in KNOWN and not name.startswith("x-"):
                near = difflib.get_close_matches(name[:64], KNOWN - ANNOTATIONS, n=1, cutoff=0.7)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise Refusal(name[:64], at, f"is no keyword of JSON Schema{hint}")

    @functools.cached_property
    def _exact(self) -> SchemaReader:
        return self if self._is_exact else SchemaReader(self._document, self._limits, is_exact=True)

    def check_disjoint(self, fields: dict[str, Any], at: str) -> None:
        """Raises Refusal unless the branches of `oneOf` exclude each other. Needs an exact reader."""
        branches = self._branches(fields, "oneOf", at)
        for j, branch in enumerate(branches):
            for i in range(j):
                if not self._sets.are_disjoint(branches[i], branch):
                    reason = f"needs branches that exclude each other, and {i} and {j} may overlap"
                    raise Refusal("oneOf", at, f"{reason}; write anyOf, or types or a const that differ")

    @functools.cached_property
    def _conditions(self) -> ConditionReader:
        exact = self._exact
        complement = Complement(exact.union_at, exact._sets)
        return ConditionReader(self._read, exact._read, count, self._sets, complement)

    def _branches(self, fields: dict[str, Any], name: str, at: str) -> list[Union]:
        return [self._read(s, step(at, name, i)) for i, s in enumerate(self._list_of(fields, name, at))]

    def _closed(self, union: Union, fields: dict[str, Any], at: str) -> Union:
        """Apply unevaluatedProperties, unevaluatedItems and uniqueItems."""
        if fields.get("uniqueItems", False) is not False:
            union = self._unique(union, fields["uniqueItems"], at)
        for name, kind in (("unevaluatedProperties", Object), ("unevaluatedItems", Array)):
            if fields.get(name, True) in (True, {}):
                continue
            if fields[name] is not False:
                raise Refusal(name, at, "is supported with true and false only")
            union = self._expanded(union)
            if any(isinstance(shape, Values) and _holds(shape.values, kind) for shape in union):
                raise Refusal(name, at, "is not supported beside enum and const of arrays or objects")
            union = tuple(self._without_rest(shape, kind) for shape in union)
        return union

    def _unique(self, union: Union, value: Any, at: str) -> Union:
        if value is not True:
            raise Refusal("uniqueItems", at, "must be true or false")
        if self._is_exact:
            raise Refusal("uniqueItems", at, "is not supported within not, if and oneOf")
        return with_unique_items(self._expanded(union), self.union_at, at)

    def _expanded(self, union: Union) -> Union:
        return tuple(
            inner
            for shape in union
            for inner in (
                self._sets.of((shape,), EVERY_TYPE)
                if isinstance(shape, Reference) or (shape,) == ANYTHING
                else (shape,)
            )
        )

    @staticmethod
    def _without_rest(shape: Shape, kind: type[Shape]) -> Shape:
        if isinstance(shape, Object) and kind is Object and shape.rest is None:
            return replace(shape, rest=())
        if isinstance(shape, Array) and kind is Array and shape.rest is None:
            return replace(shape, rest=())
        return shape

    def _list_of(self, fields: dict[str, Any], name: str, at: str) -> list[Schema]:
        value = fields.get(name, [])
        if not isinstance(value, list) or (name in fields and not value):
            raise Refusal(name, at, "must be a list of schemas that is not empty")
        return value

    def _spend(self, num_shapes: int = 1) -> None:
        self._num_shapes += num_shapes
        if self._num_shapes > self._limits.max_shapes:
            raise TooComplex(None, "", f"the schema has more than {self._limits.max_shapes} alternatives")


def _holds(values: tuple[Any, ...], kind: type[Shape]) -> bool:
    return any(isinstance(value, dict if kind is Object else list) for value in values)


def _one_of(branches: list[Union]) -> Union:
    if ANYTHING in branches:
        return ANYTHING
    return tuple(shape for branch in branches for shape in branch)
