"""`write_grammar`: settled shapes as a grammar of ours for xgrammar, where no other library can be used.

xgrammar's own reading of schemas does not enforce expressions; its grammars do. Lengths of strings are not written
here, but for a small minLength: xgrammar takes 25 ms per token for them. No character of a string is written in two
ways (there is no \\u and no \\/), so that names can be told apart.
"""

from __future__ import annotations

import json
from typing import Any, Final

from tensorweave.router.guided import code_points
from tensorweave.router.guided.code_points import ESCAPED_IN_JSON, Ranges
from tensorweave.router.guided.expressions import ANY_CHAR, Anchor, Chars, Choice, Expression, Repeat, write_count
from tensorweave.router.guided.expressions import Sequence as Parts
from tensorweave.router.guided.number_ranges import MAX_DIGITS, number_grammar
from tensorweave.router.guided.settle import SettledSchema
from tensorweave.router.guided.shapes import (
    ANYTHING,
    Anything,
    Array,
    Except,
    Number,
    Object,
    Reference,
    Shape,
    Text,
    Union,
    Values,
)

_ESCAPED: Final = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0C: "\\f", 0x0D: "\\r"}
_EMPTY: Final = '""'


def write_grammar(schema: SettledSchema, max_whitespace: int) -> str:
    """`max_whitespace`: as in `Guide`."""
    return _Writer(schema, max_whitespace).grammar(schema)


class _Writer:
    def __init__(self, schema: SettledSchema, max_whitespace: int) -> None:
        self._names = {pointer: f"d{i}" for i, pointer in enumerate(schema.referred)}
        self._rules: dict[str, str] = {}
        self._names_of_bodies: dict[str, str] = {}
        is_free = max_whitespace > 0
        space = "ws" if is_free else _EMPTY
        self._space = space
        self._comma = f'{space} "," {space}' if is_free else '", "'
        self._colon = f'{space} ":" {space}' if is_free else '": "'
        if is_free:
            self._rules["ws"] = rf"[ \n\r\t]{{0,{max_whitespace}}}"

    def grammar(self, schema: SettledSchema) -> str:
        rules = {"root": self._union(schema.root)}
        rules |= {self._names[pointer]: self._union(union) for pointer, union in schema.referred.items()}
        return "\n".join(f"{name} ::= {body}" for name, body in (rules | self._rules).items()) + "\n"

    def _rule(self, prefix: str, body: str) -> str:
        """The name of a new rule, or of the one that has this body."""
        if body not in self._names_of_bodies:
            self._names_of_bodies[body] = name = f"{prefix}{len(self._rules)}"
            self._rules[name] = body
        return self._names_of_bodies[body]

    def _union(self, union: Union) -> str:
        return " | ".join(self._shape(shape) for shape in union)

    def _group(self, union: Union) -> str:
        """The group as one symbol."""
        if union == ANYTHING:
            return self._anything()
        if len(union) == 1 and isinstance(union[0], Reference):
            return self._names[union[0].pointer]
        return self._rule("r", self._union(union))

    def _shape(self, shape: Shape) -> str:
        match shape:
            case Anything():
                return self._anything()
            case Reference(pointer):
                return self._names[pointer]
            case Values(values):
                return " | ".join(map(self._value, values))
            case Text():
                return self._text(shape)
            case Number():
                return self._number(shape)
            case Array():
                return self._array(shape)
            case Object():
                return self._object(shape)
            case Except():
                raise AssertionError("exceptions are settled")

    def _anything(self) -> str:
        if "any" not in self._rules:
            self._rules["any"] = ""
            parts = [self._text(Text()), self._number(Number()), '"true"', '"false"', '"null"']
            parts += [self._array(Array(rest=ANYTHING)), self._object(Object(rest=ANYTHING))]
            self._rules["any"] = " | ".join(parts)
        return "any"

    def _value(self, value: Any) -> str:
        """A constant; between its elements as much white space as elsewhere."""
        match value:
            case dict() if value:
                pairs = [f"{_name(key)} {self._colon} {self._value(item)}" for key, item in value.items()]
                return f'"{{" {self._space} {f" {self._comma} ".join(pairs)} {self._space} "}}"'
            case list() if value:
                items = f" {self._comma} ".join(map(self._value, value))
                return f'"[" {self._space} {items} {self._space} "]"'
        return _literal(json.dumps(value, ensure_ascii=False))

    def _char(self) -> str:
        return self._rule("char", _in_json(code_points.ANY))

    def _text(self, text: Text) -> str:
        if text.patterns:
            (expression,) = text.patterns
            return rf'"\"" {self._expression(expression)} "\""'
        char = self._char()
        return rf'"\"" {f"{char} " * text.least}{char}* "\""'

    def _expression(self, expression: Expression) -> str:
        match expression:
            case Chars() if expression == ANY_CHAR:
                return self._char()
            case Chars(ranges):
                return f"({_in_json(ranges)})"
            case Repeat(part, least, most):
                return self._repeated(part, least, most)
            case Parts(parts):
                return " ".join(self._expression(part) for part in parts if part != Parts(())) or _EMPTY
            case Choice(parts):
                return f"({' | '.join(map(self._expression, parts))})"
            case Anchor():
                raise AssertionError("anchors are gone by now")

    def _repeated(self, part: Expression, least: int, most: int | None) -> str:
        return _EMPTY if most == 0 else _several(self._rule("x", self._expression(part)), least, most)

    def _number(self, number: Number) -> str:
        if number.low is None and number.high is None:
            digits = rf'("-" | {_EMPTY}) ("0" | [1-9] [0-9]{{0,{MAX_DIGITS}}})'
            if number.is_integer:
                return digits
            exponent = rf"[eE] ([+\-] | {_EMPTY}) [0-9]{{1,2}}"
            return f'{digits} ("." [0-9]{{1,{MAX_DIGITS}}} | {_EMPTY}) ({exponent} | {_EMPTY})'
        return self._rule("n", " | ".join(number_grammar(number)))

    def _array(self, array: Array) -> str:
        least, most, prefix = array.least, array.most, array.prefix
        tail = _EMPTY
        if array.rest:
            item, num_prefix = self._group(array.rest), len(prefix)
            most_left = None if most is None else most - num_prefix
            if not prefix:
                return self._list("[", "]", item, least, most)
            if most_left != 0:
                more = self._rule("m", f"{self._comma} {item}")
                tail = _several(more, max(0, least - num_prefix), most_left)
        for place in range(len(prefix) - 1, 0, -1):
            here = f"{self._comma} {self._group(prefix[place])} {tail}"
            tail = self._rule("t", here if place < least else f"{here} | {_EMPTY}")
        if not prefix or most == 0:
            return f'"[" {self._space} "]"'
        body = f"{self._group(prefix[0])} {tail}"
        whole = f'"[" {self._space} {body} {self._space} "]"'
        return whole if least else f'({whole} | "[" {self._space} "]")'

    def _list(self, opening: str, closing: str, item: str, least: int, most: int | None) -> str:
        """Items of one kind between brackets."""
        empty = f'"{opening}" {self._space} "{closing}"'
        if most == 0:
            return empty
        more = self._rule("m", f"{self._comma} {item}")
        rest = _several(more, max(0, least - 1), None if most is None else most - 1)
        whole = f'"{opening}" {self._space} {item} {rest} {self._space} "{closing}"'
        return whole if least else f"({whole} | {empty})"

    def _object(self, shape: Object) -> str:
        if shape.patterns:
            ((name, union),) = shape.patterns
            pair = self._pair(rf'"\"" {self._expression(name)} "\""', union)
            return self._list("{", "}", pair, shape.least, shape.most)
        if not shape.properties:
            if not shape.rest:
                return f'"{{" {self._space} "}}"'
            pair = self._pair(self._text(Text()), shape.rest)
            return self._list("{", "}", pair, shape.least, shape.most)
        return f'"{{" {self._space} {self._properties(shape)} {self._space} "}}"'

    def _pair(self, name: str, union: Union) -> str:
        return self._rule("p", f"{name} {self._colon} {self._group(union)}")

    def _properties(self, shape: Object) -> str:
        """The properties in order, the optional ones or not, then the additional ones. Rules from the last backwards:
        `first` where nothing is written yet, `after` where something is."""
        first, after = _EMPTY, _EMPTY
        if shape.rest:
            key = rf'"\"" {self._other_name(set(shape.properties))} "\""'
            pair = self._pair(key, shape.rest)
            more = self._rule("m", f"{self._comma} {pair}")
            first, after = f"({pair} {more}* | {_EMPTY})", f"{more}*"
        for name in reversed(list(shape.properties)):
            pair = self._pair(_name(name), shape.properties[name])
            here, here_after = f"{pair} {after}", f"{self._comma} {pair} {after}"
            if name not in shape.required:
                here, here_after = f"{here} | {first}", f"{here_after} | {after}"
            first, after = self._rule("f", here), self._rule("a", here_after)
        return first

    def _other_name(self, names: set[str]) -> str:
        """The inside of a string that is none of `names`: a trie that is left at every character."""
        heads = sorted({name[0] for name in names if name})
        others = code_points.complement(code_points.union(tuple((ord(head), ord(head)) for head in heads)))
        branches = [] if "" in names else [_EMPTY]
        branches.append(f"({_in_json(others)}) {self._char()}*")
        for head in heads:
            rest = self._other_name({name[1:] for name in names if name.startswith(head)})
            branches.append(f"({_in_json(((ord(head), ord(head)),))}) {rest}")
        return self._rule("o", " | ".join(branches))


def _several(symbol: str, least: int, most: int | None) -> str:
    if most == 0:
        return _EMPTY
    if least == 0 and most is not None:
        return f"({symbol}{write_count(1, most)} | {_EMPTY})"
    return symbol + write_count(least, most)


def _name(name: str) -> str:
    return _literal(json.dumps(name, ensure_ascii=False))


def _literal(text: str) -> str:
    """A string of the grammar."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08x}"


def _in_json(ranges: Ranges) -> str:
    """One character of a JSON string: as it is, or escaped."""
    plain = code_points.without(ranges, ESCAPED_IN_JSON)
    branches = [f"[{''.join(_class_range(low, high) for low, high in plain)}]"] if plain else []
    for low, high in code_points.overlap(ranges, ESCAPED_IN_JSON):
        for point in range(low, high + 1):
            spelled = _ESCAPED.get(point)
            if spelled is not None:
                branches.append(_literal(spelled))
    return " | ".join(branches) if branches else _literal(f"\\u{ranges[0][0]:04x}")


def _class_range(low: int, high: int) -> str:
    return _class_point(low) if low == high else f"{_class_point(low)}-{_class_point(high)}"


def _class_point(point: int) -> str:
    char = chr(point)
    return char if char.isascii() and char.isalnum() else f"\\U{point:08x}"
