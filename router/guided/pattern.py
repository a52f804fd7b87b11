"""Regular expressions as people write them (ECMA 262, as JSON Schema uses it) to a form that both backends read alike.

The backends differ in what they do with anchors, escapes, classes and lookaround; xgrammar drops some of it with no
more than a warning. So an expression is parsed here, what is no regular language is refused by name, and what is left
is written in a small dialect: groups, alternatives, repetitions and classes of code points.
"""

from __future__ import annotations

import re
from typing import Final

from tensorweave.router.guided import code_points
from tensorweave.router.guided.code_points import Ranges
from tensorweave.router.guided.expressions import (
    ANY_TEXT,
    Anchor,
    Chars,
    Choice,
    Expression,
    PatternError,
    Repeat,
    Sequence,
    single_point,
)

MAX_REPEAT: Final = 100_000
MAX_GROUP_DEPTH: Final = 50
_MAX_SPLITS: Final = 64
_MAX_SPLIT_PARTS: Final = 20_000  # of groups with anchors, whose alternatives are each written out with all around
_MAX_CLASS_RANGES: Final = 1 << 16  # of classes such as \W, which has 750

_SINGLE: Final = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_NOT_REGULAR: Final = {
    "(?=": "lookahead",
    "(?!": "lookahead",
    "(?<=": "lookbehind",
    "(?<!": "lookbehind",
}
_BRACES: Final = re.compile(r"\{([0-9]{1,6})(?:(,)([0-9]{1,6})?)?\}")
_GROUP: Final = re.compile(r"\((?:\?(?::|P?<[A-Za-z_][A-Za-z0-9_]*>))?")
_HEX: Final = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_LOW_SURROGATE: Final = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")


def parse_search(text: str) -> Expression:
    """The language of all strings in which the expression matches somewhere, as JSON Schema's `pattern` means it."""
    return Choice(tuple(_whole(alternative, ANY_TEXT) for alternative in _alternatives(_Parser(text).parse())))


def parse_match(text: str) -> Expression:
    """The language of all strings that the expression matches as a whole; anchors at its ends change nothing."""
    return Choice(tuple(_whole(alternative, Sequence(())) for alternative in _alternatives(_Parser(text).parse())))


def _alternatives(expression: Expression) -> list[tuple[Expression, ...]]:
    """The alternatives of the top level: anchors may stand at their ends."""
    found: list[tuple[Expression, ...]] = []
    waiting, num_splits, num_parts = [expression], 0, 0
    while waiting:
        match waiting.pop():
            case Choice(parts):
                waiting += reversed(parts)
                continue
            case Sequence((*before, Choice() | Sequence() as group)) if _has_anchor(group):
                after: list[Expression] = []
            case Sequence((Choice() | Sequence() as group, *after)) if _has_anchor(group):
                before = []
            case one:
                found.append(_parts(one))
                continue
        branches = [_parts(branch) for branch in (group.parts if isinstance(group, Choice) else (group,))]
        num_splits += 1
        num_parts += sum(map(len, branches)) + len(branches) * (len(before) + len(after))
        if num_splits > _MAX_SPLITS or num_parts > _MAX_SPLIT_PARTS:
            raise PatternError("'^' and '$' stand in too many groups, or in groups that are too large")
        waiting += [Sequence((*before, *branch, *after)) for branch in reversed(branches)]
    return found


def _parts(expression: Expression) -> tuple[Expression, ...]:
    return expression.parts if isinstance(expression, Sequence) else (expression,)


def _whole(parts: tuple[Expression, ...], around: Expression) -> Expression:
    first, last = 0, len(parts)
    while first < last and parts[first] == Anchor(is_start=True):
        first += 1
    while last > first and parts[last - 1] == Anchor(is_start=False):
        last -= 1
    inner = parts[first:last]
    if any(map(_has_anchor, inner)):
        raise PatternError("'^' and '$' are supported at the ends of the expression and of its alternatives only")
    before = Sequence(()) if first else around
    after = Sequence(()) if last < len(parts) else around
    return Sequence((before, *inner, after))


def _has_anchor(expression: Expression) -> bool:
    match expression:
        case Anchor():
            return True
        case Repeat(part):
            return _has_anchor(part)
        case Sequence(parts) | Choice(parts):
            return any(map(_has_anchor, parts))
        case Chars():
            return False


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._num_class_ranges = 0

    def parse(self) -> Expression:
        parsed = self._choice()
        if self._at < len(self._text):
            raise PatternError(f"unmatched ')' at character {self._at}")
        return parsed

    def _choice(self) -> Expression:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self) -> Expression:
        parts: list[Expression] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return Sequence(tuple(parts))

    def _repeated(self, atom: Expression) -> Expression:
        count = self._count()
        if count is None:
            return atom
        if isinstance(atom, Anchor):
            raise PatternError(f"nothing to repeat at character {self._at}")
        self._take("?")  # lazy or not, the language is the same
        if self._at < len(self._text) and self._text[self._at] in "*+?":
            raise PatternError(f"a repetition of a repetition at character {self._at}")
        least, most = count
        if most is not None and most < least:
            raise PatternError(f"the repetition {{{least},{most}}} has its bounds the wrong way round")
        if max(least, most or 0) > MAX_REPEAT:
            raise PatternError(f"a repetition may have at most {MAX_REPEAT}")
        return Repeat(atom, least, most)

    def _count(self) -> tuple[int, int | None] | None:
        for sign, count in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return count
        if found := _BRACES.match(self._text, self._at):
            self._at = found.end()
            least = int(found[1])
            return least, (int(found[3]) if found[3] else None) if found[2] else least
        if self._text.startswith("{,", self._at):
            raise PatternError("'{,n}' means different things to different libraries; write '{0,n}'")
        return None

    def _atom(self) -> Expression:
        char = self._text[self._at]
        if char == "(":
            return self._group()
        self._at += 1
        match char:
            case "^" | "$":
                return Anchor(is_start=char == "^")
            case ".":
                return Chars(code_points.complement(code_points.LINE_ENDS))
            case "[":
                return self._class()
            case "\\":
                return Chars(self._escape(in_class=False))
            case "*" | "+" | "?":
                raise PatternError(f"nothing to repeat at character {self._at - 1}")
        return Chars(single_point(ord(char)))

    def _group(self) -> Expression:
        for start, name in _NOT_REGULAR.items():
            if self._text.startswith(start, self._at):
                raise PatternError(f"{name} ('{start}') is not supported")
        found = _GROUP.match(self._text, self._at)
        assert found is not None
        if found[0] == "(" and self._text.startswith("(?", self._at):
            raise PatternError(f"a group of the kind {self._text[self._at : self._at + 4]!r} is not supported")
        self._at = found.end()
        self._depth += 1
        if self._depth > MAX_GROUP_DEPTH:
            raise PatternError(f"groups are nested more than {MAX_GROUP_DEPTH} deep")
        inner = self._choice()
        if not self._take(")"):
            raise PatternError("a group is not closed")
        self._depth -= 1
        return inner if isinstance(inner, Choice) else Sequence((inner,))

    def _class(self) -> Expression:
        is_negated = self._take("^")
        ranges: list[Ranges] = []
        while not self._take("]"):
            item = self._class_item()
            ranges.append(code_points.widest(item) if is_negated else item)
        if not ranges:
            raise PatternError("an empty class of characters means different things to different libraries")
        chosen = code_points.union(*ranges)
        if is_negated:
            chosen = code_points.complement(chosen)
        if not chosen:
            raise PatternError("a class of characters has none")
        return Chars(chosen)

    def _class_item(self) -> Ranges:
        low = self._class_char()
        if not self._text.startswith("-", self._at) or self._text.startswith("-]", self._at):
            return low
        if not _is_single(low):
            return low  # as in [\w-x]: the hyphen is next
        self._at += 1
        high = self._class_char()
        if not _is_single(high):
            return code_points.union(low, single_point(ord("-")), high)
        if high[0][0] < low[0][0]:
            raise PatternError("a range of characters has its ends the wrong way round")
        return code_points.without(((low[0][0], high[0][0]),), ((0xD800, 0xDFFF),))

    def _class_char(self) -> Ranges:
        if self._at >= len(self._text):
            raise PatternError("a class of characters is not closed")
        char = self._text[self._at]
        self._at += 1
        return self._escape(in_class=True) if char == "\\" else single_point(ord(char))

    def _escape(self, *, in_class: bool) -> Ranges:
        if self._at >= len(self._text):
            raise PatternError("the expression ends with a backslash")
        if found := _HEX.match(self._text, self._at):
            self._at = found.end()
            return self._code_point(int(found[1] or found[2] or found[3], 16))
        char = self._text[self._at]
        self._at += 1
        if (ranges := _class_escape(char)) is not None:
            self._num_class_ranges += len(ranges)
            if self._num_class_ranges > _MAX_CLASS_RANGES:
                raise PatternError("it has too many classes of characters such as '\\W'")
            return ranges
        if char in _SINGLE and not (char == "0" and self._text[self._at : self._at + 1].isdigit()):
            return single_point(_SINGLE[char])
        if char == "b" and in_class:
            return single_point(8)
        if char == "c" and re.match(r"[A-Za-z]", self._text[self._at : self._at + 1]):
            self._at += 1
            return single_point(ord(self._text[self._at - 1]) % 32)
        if char.isascii() and (char.isalnum() or char == "_"):
            raise PatternError(f"'\\{char}' {_why_refused(char)}")
        return single_point(ord(char))

    def _code_point(self, point: int) -> Ranges:
        """The escaped character; two escaped surrogates are one."""
        if 0xD800 <= point <= 0xDBFF and (low := _LOW_SURROGATE.match(self._text, self._at)):
            self._at = low.end()
            point = 0x10000 + ((point - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        return single_point(point)

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True


def _class_escape(char: str) -> Ranges | None:
    match char:
        case "d":
            return code_points.DIGITS
        case "w":
            return code_points.WORD
        case "s":
            return code_points.SPACE
        case "D":
            return code_points.not_digit()
        case "W":
            return code_points.not_word()
        case "S":
            return code_points.not_space()
    return None


def _why_refused(char: str) -> str:
    if char in "123456789k":
        return "(a backreference) is not supported"
    if char in "bB":
        return "(a word boundary) is not supported"
    return "(a class of Unicode) is not supported" if char in "pP" else "is no escape of ECMA 262"


def _is_single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]
