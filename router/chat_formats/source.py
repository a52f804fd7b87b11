"""`Source`: the unread text of an answer that is still being written, for parsers that are generators.

A parser is a generator that yields when it needs more text, and goes on when `push` or `end` was called. All decisions
depend on the text alone, so the result is the same however the text is cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

_T = TypeVar("_T")
Step = Generator[None, None, _T]
"""A part of a parser: yields to wait for more text, returns a result."""

_MAX_HELD_CHARS: Final = 4096
"""More text is not read in order to find out whether a call has begun; it is content then."""
_NOT_SPACE: Final = re.compile(r"\S")


class NoCall(Exception):
    """What follows is not what was expected; the text since the mark becomes content."""


class Markers:
    """A set of texts to search for, none of which is part of another."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        for text in self.texts:
            assert text, "an empty marker"
            assert sum(text in other for other in self.texts) == 1, f"{text!r} is part of another marker"
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._beginnings = frozenset(text[:size] for text in self.texts for size in range(1, len(text)))
        self._max_held = max(map(len, self._beginnings), default=0)

    def num_held(self, text: str, start: int) -> int:
        """How many characters at the end of `text`, from `start` on, may be the beginning of a marker."""
        for size in range(min(self._max_held, len(text) - start), 0, -1):
            if text[-size:] in self._beginnings:
                return size
        return 0


class Source:
    """Text with a reading position. Steps that end in `yield from` wait for as much text as they need to decide."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._mark: int | None = None
        self._has_ended = False

    def push(self, text: str) -> None:
        start = self._position if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._position -= start
        self._mark = None if self._mark is None else 0

    def end(self) -> None:
        """No more text comes."""
        self._has_ended = True

    def mark(self) -> None:
        """Remember the position, for `reset`."""
        self._mark = self._position

    @property
    def is_marked(self) -> bool:
        return self._mark is not None

    @property
    def is_exhausted(self) -> bool:
        """Whether the text has ended and all of it was read."""
        return self._has_ended and self._position == len(self._text)

    def release(self) -> None:
        """Forget the mark."""
        self._mark = None

    def reset(self) -> None:
        """Return to the mark."""
        assert self._mark is not None, "no mark"
        self._position, self._mark = self._mark, None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """If NoCall is raised within, return to the position before, unless the text has ended: what the end has cut
        is dropped then."""
        self.mark()
        try:
            yield
        except NoCall:
            if not self.is_exhausted:
                self.reset()
            raise
        finally:
            self.release()

    def more(self) -> Step[bool]:
        """Wait for more text; False if the text has ended."""
        if self._has_ended:
            return False
        yield
        return True

    def _move(self, position: int) -> None:
        """Raises NoCall if too much was read since the mark. It depends on the position alone, not on how much text
        there is already, so that the cut of the text makes no difference."""
        self._position = position
        if self._mark is not None and position - self._mark > _MAX_HELD_CHARS:
            raise NoCall

    def peek(self, size: int) -> Step[str]:
        """The next `size` characters, fewer only at the end of the text."""
        while len(self._text) - self._position < size:
            if not (yield from self.more()):
                break
        return self._text[self._position : self._position + size]

    def skip(self, size: int) -> None:
        """Read `size` characters that `peek` has returned."""
        assert self._position + size <= len(self._text), "skips more than there is"
        self._move(self._position + size)

    def skip_rest(self) -> None:
        """Read all of the text that there is."""
        self._position = len(self._text)

    def until(self, markers: Markers, emit: Callable[[str], None], *, drops_cut: bool = False) -> Step[str | None]:
        """Pass the text before the first marker to `emit`, as it comes. Return the marker, which is not read; None at
        the end of the text. `drops_cut`: a marker that the end of the text has cut is not passed on."""
        while True:
            text, start = self._text, self._position
            if match := markers.pattern.search(text, start):
                self._move(match.start())
                self._pass(text[start : match.start()], emit)
                return match.group()
            num_held = 0 if self._has_ended and not drops_cut else markers.num_held(text, start)
            self._move(len(text) - num_held)
            self._pass(text[start : self._position], emit)
            if not (yield from self.more()):
                self._move(len(text))
                return None

    def run(self, pattern: re.Pattern[str], emit: Callable[[str], None]) -> Step[str]:
        """Pass all text that `pattern`, which is a character class repeated, matches to `emit`. Return the character
        after it; "" at the end of the text."""
        while True:
            match = pattern.match(self._text, self._position)
            if match:
                self._move(match.end())
                self._pass(match.group(), emit)
            if self._position < len(self._text):
                return self._text[self._position]
            if not (yield from self.more()):
                return ""

    def spaces(self) -> Step[str]:
        """Read white space and return the character after it, which is not read; "" at the end of the text."""
        while True:
            if match := _NOT_SPACE.search(self._text, self._position):
                self._move(match.start())
                return match.group()
            self._move(len(self._text))
            if not (yield from self.more()):
                return ""

    def next_of(self, *options: str) -> Step[str | None]:
        """Which of `options` comes next, without reading it: the longest that fits."""
        longest = max(map(len, options))
        while True:
            unread = self._text[self._position : self._position + longest]
            best = max((option for option in options if unread.startswith(option)), key=len, default=None)
            may_grow = any(len(option) > len(unread) and option.startswith(unread) for option in options)
            if not may_grow or not (yield from self.more()):
                return best

    def ends_in(self, *options: str) -> bool:
        """Whether the text has ended, before one of `options` was complete that may have come next."""
        unread = self._text[self._position :]
        return self._has_ended and any(option.startswith(unread) for option in options)

    def word(self, pattern: re.Pattern[str]) -> Step[str]:
        """Read what `run` passes on, as one text."""
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        return "".join(pieces)

    def expect(self, *options: str) -> Step[str]:
        """Read white space and then one of `options`. Raises NoCall if none of them comes."""
        yield from self.spaces()
        if (found := (yield from self.take(*options))) is None:
            raise NoCall
        return found

    def take(self, *options: str) -> Step[str | None]:
        """Read one of `options` if it comes next."""
        found = yield from self.next_of(*options)
        self.skip(len(found or ""))
        return found

    def take_closing(self, marker: str) -> Step[bool]:
        """Read `marker` if it comes next; at the end of the text, as much of it as there is."""
        unread = yield from self.peek(len(marker))
        is_there = bool(unread) and marker.startswith(unread)
        self.skip(len(unread) if is_there else 0)
        return is_there

    @staticmethod
    def _pass(text: str, emit: Callable[[str], None]) -> None:
        if text:
            emit(text)
