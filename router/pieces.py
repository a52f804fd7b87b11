"""Text from token ids, a few ids at a time, without ever splitting a character.

Three ways, by the tokenizer's decoder: byte-level BPE (one UTF-8 byte stream), SentencePiece-like byte fallback (pieces
of text between runs of single bytes), and, for any other, re-decoding of a short window. The first two cost O(1) a
token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import tokenizers

REPLACEMENT: Final = "\ufffd"
_MAX_WINDOW_HOLD: Final = 8  # tokens: a character takes at most four byte tokens, so a longer hold is a real U+FFFD


class TextAssembler(Protocol):
    """`add` returns the text that the new ids complete; `finish` whatever was still incomplete."""

    @property
    def is_whole(self) -> bool:
        """Nothing waits for more ids."""

    def add(self, token_ids: Iterable[int]) -> str: ...

    def finish(self) -> str: ...


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for the 256 bytes (GPT-2's table, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF: Final = _byte_level_alphabet()


class ByteLevelPieces:
    """The bytes of each token of a byte-level vocabulary, looked up once per token id and shared by all requests."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        piece = self._bytes.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                piece = bytes(_BYTE_OF[char] for char in token)
            except KeyError:  # an added token written as plain text
                piece = token.encode()
            self._bytes[token_id] = piece
        return piece


class ByteFallbackPieces:
    """Each token of a SentencePiece-like vocabulary: its text, or the one byte that a `<0xE4>` stands for.

    `strip_left` is how many leading spaces the whole text loses.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, space: str | None, strip_left: int) -> None:
        self._backend = backend
        self._space = space
        self.strip_left = strip_left
        self._pieces: dict[int, str | int | None] = {}

    def __getitem__(self, token_id: int) -> str | int | None:
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._read(self._backend.id_to_token(token_id))
            return piece

    def _read(self, token: str | None) -> str | int | None:
        if token is None:
            return None
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                pass
        return token if self._space is None else token.replace(self._space, " ")


@dataclass(frozen=True, slots=True)
class WindowedPieces:
    """Any other tokenizer: only its own decode of a list of ids is known."""

    decode: Callable[[Sequence[int]], str]


Pieces = ByteLevelPieces | ByteFallbackPieces | WindowedPieces


def read_pieces(backend: tokenizers.Tokenizer) -> ByteLevelPieces | ByteFallbackPieces | None:
    """The fast table that fits this tokenizer's decoder, or None where only a window will do."""
    if backend.decoder is None:
        return None
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return ByteLevelPieces(backend)
    if decoder["type"] != "Sequence":
        return None
    steps: list[dict[str, Any]] = decoder["decoders"]
    space, strip_left = None, 0
    if steps and steps[0]["type"] == "Replace" and steps[0]["content"] == " ":
        space = steps[0]["pattern"].get("String")
        steps = steps[1:] if space is not None else steps
    if [step["type"] for step in steps[:2]] != ["ByteFallback", "Fuse"]:
        return None
    match steps[2:]:
        case []:
            pass
        case [{"type": "Strip", "content": " ", "start": start, "stop": 0}]:
            strip_left = int(start)
        case _:
            return None
    return ByteFallbackPieces(backend, space=space, strip_left=strip_left)


class ByteLevelText:
    """One stream of bytes; malformed parts become U+FFFD as in the Unicode standard's maximal-subpart practice."""

    def __init__(self, pieces: ByteLevelPieces, skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_whole(self) -> bool:
        return not self._utf8.getstate()[0]

    def add(self, token_ids: Iterable[int]) -> str:
        pieces, skipped = self._pieces, self._skipped
        return self._utf8.decode(b"".join([pieces[token] for token in token_ids if token not in skipped]))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteFallbackText:
    """Text pieces between runs of bytes.

    A run's characters are released as they complete; from its first malformed byte on, each byte becomes a U+FFFD.
    """

    def __init__(self, pieces: ByteFallbackPieces, skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._to_strip = pieces.strip_left
        self._run = bytearray()
        self._is_malformed = False

    @property
    def is_whole(self) -> bool:
        return not self._run

    def add(self, token_ids: Iterable[int]) -> str:
        out: list[str] = []
        for token in token_ids:
            if token in self._skipped:
                continue
            piece = self._pieces[token]
            if isinstance(piece, int):
                out.append(self._add_byte(piece))
            elif piece is not None:
                out.append(self._end_run())
                out.append(piece)
        return self._strip("".join(out))

    def finish(self) -> str:
        return self._strip(self._end_run())

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

    ids: [ context | pending ]; `_context_text` is the decoded context. Text that ends in U+FFFD waits for more.
    """

    def __init__(self, pieces: WindowedPieces, skipped: frozenset[int]) -> None:
        self._decode = pieces.decode
        self._skipped = skipped
        self._ids: list[int] = []
        self._num_context = 0
        self._context_text = ""

    @property
    def is_whole(self) -> bool:
        return len(self._ids) == self._num_context

    def add(self, token_ids: Iterable[int]) -> str:
        self._ids.extend([token for token in token_ids if token not in self._skipped])
        if len(self._ids) == self._num_context:
            return ""
        text = self._decode(self._ids)
        is_held = text.endswith(REPLACEMENT) and len(self._ids) - self._num_context <= _MAX_WINDOW_HOLD
        return "" if is_held else self._release(text)

    def finish(self) -> str:
        return self._release(self._decode(self._ids)) if len(self._ids) > self._num_context else ""

    def _release(self, text: str) -> str:
        new = text[len(self._context_text) :]
        if new:
            del self._ids[: self._num_context]
            self._num_context = len(self._ids)
            self._context_text = self._decode(self._ids)
        return new


def assemble(pieces: Pieces, skipped: frozenset[int]) -> TextAssembler:
    """A fresh assembler for one sequence; `skipped` ids leave no text."""
    match pieces:
        case ByteLevelPieces():
            return ByteLevelText(pieces, skipped)
        case ByteFallbackPieces():
            return ByteFallbackText(pieces, skipped)
        case WindowedPieces():
            return WindowedText(pieces, skipped)
