"""Copies Python literals from an answer as JSON, as they come."""

from __future__ import annotations

import json
import re
from typing import Final

from tensorweave.router.chat_formats.json_text import JSON_NUMBER, Emit
from tensorweave.router.chat_formats.source import NoCall, Source, Step

_MAX_DEPTH: Final = 64
_WORD: Final = re.compile(r"[\w.+\-]+")
_TEXT_OF: Final = {quote: re.compile(rf"[^\\\n{quote}]+") for quote in ("'", '"')}
_CONSTANTS: Final = {"True": "true", "true": "true", "False": "false", "false": "false", "None": "null", "null": "null"}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_CODE_SIZES: Final = {"x": 2, "u": 4, "U": 8}
_HEX: Final = re.compile(r"[0-9a-fA-F]+")
_CLOSING: Final = {"[": "]", "(": ")", "{": "}"}


def copy_python(source: Source, emit: Emit, depth: int = 0) -> Step[None]:
    """Read a literal (string, number, constant, list, tuple, dictionary) and pass it to `emit` as JSON. Raises NoCall
    where it is none, or where the text ends."""
    first = yield from source.spaces()
    if first in ("'", '"'):
        yield from _copy_string(source, emit, first)
    elif first in _CLOSING and depth < _MAX_DEPTH:
        yield from _copy_items(source, emit, first, depth + 1)
    else:
        with source.restored():
            word = yield from source.word(_WORD)
            if source.is_exhausted or (number := _CONSTANTS.get(word) or _number(word)) is None:
                raise NoCall
        emit(number)


def _number(word: str) -> str | None:
    word = word.replace("_", "")
    if JSON_NUMBER.fullmatch(word):
        return word
    try:
        return json.dumps(float(word), allow_nan=False)
    except ValueError:
        return None


def _copy_items(source: Source, emit: Emit, opening: str, depth: int) -> Step[None]:
    closing = _CLOSING[opening]
    source.skip(1)
    emit("{" if opening == "{" else "[")
    separator = ""
    while (following := (yield from source.spaces())) != closing:
        if not following:
            raise NoCall
        emit(separator)
        if opening == "{":
            yield from _copy_key(source, emit)
        yield from copy_python(source, emit, depth)
        separator = ", "
        if (yield from source.spaces()) != closing:
            yield from source.expect(",")
    source.skip(1)
    emit("}" if opening == "{" else "]")


def _copy_key(source: Source, emit: Emit) -> Step[None]:
    if (first := (yield from source.spaces())) not in ("'", '"'):
        raise NoCall
    yield from _copy_string(source, emit, first)
    yield from source.expect(":")
    emit(": ")


def _copy_string(source: Source, emit: Emit, quote: str) -> Step[None]:
    """A string in one or three quotes. A line break in one quote is none in Python, but models write it."""
    end = (yield from source.next_of(quote, quote * 2, quote * 3)) or quote
    source.skip(len(end))
    if len(end) == 2 and source.is_exhausted:  # two quotes of three
        raise NoCall
    emit('"')
    while len(end) != 2:
        yield from source.run(_TEXT_OF[quote], lambda text: emit(_escaped(text)))
        if (yield from source.take(end)):
            break
        if (yield from source.take("\\")):
            yield from _copy_escape(source, emit)
        elif source.ends_in(end):
            raise NoCall
        else:
            emit(_escaped((yield from source.peek(1))))
            source.skip(1)
    emit('"')


def _copy_escape(source: Source, emit: Emit) -> Step[None]:
    kind = yield from source.peek(1)
    source.skip(len(kind))
    if not kind:
        raise NoCall
    if kind in _ESCAPES:
        emit(_escaped(_ESCAPES[kind]))
    elif kind in _CODE_SIZES:
        yield from _copy_code(source, emit, kind)
    else:
        emit(kind if kind in "'/" else _escaped(kind) if kind in '"\\' else f"\\\\{_escaped(kind)}")


def _copy_code(source: Source, emit: Emit, kind: str) -> Step[None]:
    """An escaped code point. Those of four digits may be half of a pair, so they stay escaped."""
    digits = yield from source.peek(_CODE_SIZES[kind])
    if len(digits) < _CODE_SIZES[kind]:
        raise NoCall
    if not _HEX.fullmatch(digits) or int(digits, 16) > 0x10FFFF:
        emit(f"\\\\{kind}")
        return
    source.skip(len(digits))
    emit(f"\\u{digits}" if kind == "u" else json.dumps(chr(int(digits, 16)))[1:-1])


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
