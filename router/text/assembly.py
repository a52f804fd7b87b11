"""Text from token ids, a few ids at a time, without ever splitting a character: one `TextAssembler` per sequence.

An assembler starts after its left context, the last ids of a prompt: it returns what the tokenizer's decode of prompt
and sequence has after the prompt's text. A character that is incomplete at the prompt's end is returned with the
sequence. With byte tables a token costs O(1); other tokenizers decode a short window again.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from tensorweave.router.text.pieces import REPLACEMENT, ByteFallbackPieces, ByteLevelPieces, Pieces, WindowedPieces

_MAX_WINDOW_HOLD: Final = 8  # tokens: a character takes at most four byte tokens, so a longer hold is a real U+FFFD


class TokenText(NamedTuple):
    """The text that one token completes, and where in it the token begins.

    Attributes:
        text: The text; empty while a character is incomplete.
        begin: Index of the token's first character, counted from the end of the text before. After an incomplete
            character it may lie within later text, and the smaller `begin` of a later token corrects it.
        is_part: The token begins or ends within a character.
    """

    text: str
    begin: int = 0
    is_part: bool = False


class TextAssembler(Protocol):
    """`add` returns the text that the new ids complete; `finish` returns the rest, which was incomplete."""

    @property
    def is_whole(self) -> bool:
        """No character is incomplete."""

    @property
    def is_at_start(self) -> bool:
        """There is no text yet, so the next token may lose a space that it has elsewhere."""

    def add(self, token_ids: Iterable[int]) -> str: ...

    def add_one(self, token_id: int) -> TokenText: ...

    def finish(self) -> str: ...


class ByteLevelText:
    """One stream of bytes; malformed parts become U+FFFD as in the Unicode standard's maximal-subpart practice."""

    is_at_start = False

    def __init__(self, pieces: ByteLevelPieces, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(b"".join([pieces[token] for token in context]))

    @property
    def is_whole(self) -> bool:
        return not self._utf8.getstate()[0]

    def add(self, token_ids: Iterable[int]) -> str:
        pieces, skipped = self._pieces, self._skipped
        return self._utf8.decode(b"".join([pieces[token] for token in token_ids if token not in skipped]))

    def add_one(self, token_id: int) -> TokenText:
        piece = b"" if token_id in self._skipped else self._pieces[token_id]
        if self.is_whole or not piece:
            text = self._utf8.decode(piece)
            return TokenText(text, 0, is_part=bool(piece) and not self.is_whole)
        first = self._utf8.decode(piece[:1])
        continues = not first or (len(first) == 1 and self.is_whole)  # otherwise the earlier bytes have become U+FFFD
        text = first + self._utf8.decode(piece[1:])
        return TokenText(text, 0 if continues else 1, is_part=continues or not self.is_whole)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteFallbackText:
    """Text pieces between runs of bytes.

    A run's characters are returned as they are completed; from its first malformed byte on, each byte becomes U+FFFD.
    (The tokenizer's own decode, which has the whole run, makes U+FFFD of the characters before that byte too.)
    """

    def __init__(self, pieces: ByteFallbackPieces, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._to_strip = pieces.strip_left
        self._run = bytearray()
        self._is_malformed = False
        for token in context:
            self._add_piece(pieces[token])

    @property
    def is_whole(self) -> bool:
        return not self._run

    @property
    def is_at_start(self) -> bool:
        return self._to_strip > 0

    def add(self, token_ids: Iterable[int]) -> str:
        return "".join([self.add_one(token).text for token in token_ids])

    def add_one(self, token_id: int) -> TokenText:
        return self._add_piece(None if token_id in self._skipped else self._pieces[token_id])

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _add_piece(self, piece: str | int | None) -> TokenText:
        num_pending = len(self._run)
        if piece is None:
            return TokenText("", num_pending)
        if isinstance(piece, str):
            ended = self._strip(self._end_run())
            return TokenText(ended + self._strip(piece), len(ended))
        text = self._strip(self._add_byte(piece))
        completes = num_pending > 0 and len(text) == 1 and not self._is_malformed
        return TokenText(text, 0 if completes else num_pending, is_part=num_pending > 0 or bool(self._run))

    def _add_byte(self, byte: int) -> str:
        if self._is_malformed:
            return REPLACEMENT
        self._run.append(byte)
        try:
            text, used = codecs.utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            self._is_malformed = True
            text, used = REPLACEMENT * len(self._run), len(self._run)
        del self._run[:used]
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._run)
        self._run.clear()
        self._is_malformed = False
        return text

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != " ":
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class WindowedText:
    """Decodes the last few tokens with and without the new ones, and takes the difference.

    ids: [ context | pending ]; the first `_num_returned` characters of their text have been returned. U+FFFD at the end
    is kept in `_held` until more ids arrive.
    """

    def __init__(self, pieces: WindowedPieces, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._ids = list(context)
        self._num_context = self._num_whole(self._ids)
        self._num_returned = len(pieces.decode(self._ids[: self._num_context])) if context else 0
        self._held = ""
        if not self.is_whole:
            self._hold(pieces.decode(self._ids)[self._num_returned :])

    @property
    def is_whole(self) -> bool:
        return len(self._ids) == self._num_context

    @property
    def is_at_start(self) -> bool:
        return not self._ids

    def add(self, token_ids: Iterable[int]) -> str:
        return "".join([self.add_one(token).text for token in token_ids])

    def add_one(self, token_id: int) -> TokenText:
        held = self._held
        if token_id in self._skipped or not self._pieces.knows(token_id):
            return TokenText("", len(held))
        self._ids.append(token_id)
        text = self._pieces.decode(self._ids)[self._num_returned :]
        begin = _num_common(held, text)
        num_pending = len(self._ids) - self._num_context
        if text.endswith(REPLACEMENT) and num_pending <= _MAX_WINDOW_HOLD:
            return TokenText(self._hold(text), begin, is_part=True)
        if text:
            self._move_context()
        elif num_pending > _MAX_WINDOW_HOLD:
            del self._ids[self._num_context :]  # they have no text
        return TokenText(text, begin, is_part=begin < len(held))

    def finish(self) -> str:
        text = self._pieces.decode(self._ids)[self._num_returned :] if not self.is_whole else ""
        self._move_context()
        return text

    def _hold(self, text: str) -> str:
        """Keep incomplete text at the end, and return the rest."""
        whole = text.rstrip(REPLACEMENT)
        self._num_returned += len(whole)
        self._held = text[len(whole) :]
        return whole

    def _move_context(self) -> None:
        del self._ids[: self._num_context]
        self._num_context, self._held = len(self._ids), ""
        self._num_returned = len(self._pieces.decode(self._ids))

    def _num_whole(self, context: Sequence[int]) -> int:
        """The largest number of first ids whose text ends with a complete character."""
        for num_ids in range(len(context), max(len(context) - _MAX_WINDOW_HOLD, 0) - 1, -1):
            if not num_ids or not self._pieces.decode(context[:num_ids]).endswith(REPLACEMENT):
                return num_ids
        return len(context)


def _num_common(before: str, after: str) -> int:
    """The length of the common prefix."""
    pairs = zip(before, after, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def assemble(pieces: Pieces, skipped: frozenset[int], context: Sequence[int] = ()) -> TextAssembler:
    """A new assembler for one sequence. `skipped` ids have no text. `context`: `pieces.left_context` of the prompt."""
    match pieces:
        case ByteLevelPieces():
            return ByteLevelText(pieces, skipped, context)
        case ByteFallbackPieces():
            return ByteFallbackText(pieces, skipped, context)
        case WindowedPieces():
            return WindowedText(pieces, skipped, context)
