"""Copies JSON from an answer, as it comes, without waiting for its end.

Only the ends of strings, objects and arrays are looked for; what lies between passes as it is. Two mistakes that models
make inside strings are corrected, because what was meant is certain: line breaks and other control characters that are
not escaped, and backslashes that escape nothing (`"\\d+"`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable
from typing import Final

from tensorweave.router.chat_formats.source import Markers, NoCall, Source, Step

Emit = Callable[[str], None]

JSON_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)

_STRING_TEXT: Final = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR_TEXT: Final = re.compile(r'[^\s,:;\[\]{}"<]+')
_FOUR_HEX: Final = re.compile(r"[0-9a-fA-F]{4}")


@functools.cache
def _structure(stops: tuple[str, ...]) -> Markers:
    return Markers(['"', "{", "}", "[", "]", *stops])


def copy_value(source: Source, emit: Emit, stops: tuple[str, ...] = ()) -> Step[bool]:
    """Read a value and pass its text to `emit`. Return whether it is complete: its end was found before one of `stops`,
    which end it outside of strings, and before the end of the text."""
    first = yield from source.peek(1)
    if first == '"':
        return (yield from copy_string(source, emit))
    if first in ("{", "["):
        return (yield from _copy_nested(source, emit, stops))
    after = yield from source.run(_SCALAR_TEXT, emit)
    return after != ""


def _copy_nested(source: Source, emit: Emit, stops: tuple[str, ...]) -> Step[bool]:
    markers, depth = _structure(stops), 0
    while (marker := (yield from source.until(markers, emit, drops_cut=True))) is not None and marker not in stops:
        if marker == '"':
            yield from copy_string(source, emit)
            continue
        source.skip(1)
        emit(marker)
        depth += 1 if marker in "{[" else -1
        if depth == 0:
            return True
    return False


def copy_string(source: Source, emit: Emit) -> Step[bool]:
    """Read a string, from quote to quote, and pass it to `emit` as correct JSON. Return whether it has ended."""
    source.skip(1)
    emit('"')
    while True:
        match (yield from source.run(_STRING_TEXT, emit)):
            case "":
                return False
            case '"':
                source.skip(1)
                emit('"')
                return True
            case "\\":
                yield from _copy_escape(source, emit)
            case control:
                source.skip(1)
                emit(json.dumps(control)[1:-1])


def _copy_escape(source: Source, emit: Emit) -> Step[None]:
    escape = yield from source.peek(2)
    if escape == "\\u":
        escape = yield from source.peek(6)
        if not _FOUR_HEX.fullmatch(escape, 2) and len(escape) == 6:
            escape = "\\"
    elif escape == "\\'":
        source.skip(2)
        emit("'")
        return
    elif len(escape) == 2 and escape[1] not in '"\\/bfnrt':
        escape = "\\"
    source.skip(len(escape))
    if escape != "\\":
        emit(escape)
    elif (yield from source.peek(1)):
        emit("\\\\")


def read_string(source: Source) -> Step[str]:
    """The value of a string. Raises NoCall if there is none."""
    if (yield from source.spaces()) != '"':
        raise NoCall
    pieces: list[str] = []
    if not (yield from copy_string(source, pieces.append)):
        raise NoCall
    text: str = json.loads("".join(pieces))
    return text


def skip_value(source: Source) -> Step[None]:
    """Read a value of which nothing is needed. Raises NoCall if it does not end."""
    yield from source.spaces()
    if not (yield from copy_value(source, lambda text: None)):
        raise NoCall


def skip_to_end(source: Source, end: str) -> Step[None]:
    """Read the marker after a value, also if there are some closing brackets too many before it. If it does not come,
    nothing is read."""
    yield from source.spaces()
    with contextlib.suppress(NoCall), source.restored():
        while (yield from source.spaces()) in ("}", "]"):
            source.skip(1)
        if not (yield from source.take_closing(end)):
            raise NoCall
