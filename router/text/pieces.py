"""What each token of a vocabulary adds to a text, according to the tokenizer's decoder. Used by `assembly`.

There are three kinds: byte-level BPE (one UTF-8 byte stream), SentencePiece-like byte fallback (pieces of text between
runs of single bytes), and all others, which can only decode a list of ids. Each kind finds a prompt's left context: the
last few ids, after which an answer has the same text as after the whole prompt.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence, Set
from typing import Any, Final

import tokenizers

REPLACEMENT: Final = "\ufffd"
_MAX_PENDING_BYTES: Final = 3  # of an incomplete UTF-8 character
_WINDOW_CONTEXT: Final = 16  # tokens: an incomplete character, and enough before it for any decoder


def decode_utf8(raw: bytes) -> str | None:
    """The text of `raw`; None if it is not complete characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _byte_level_alphabet() -> dict[str, int]:
    """The 256 bytes by the printable characters that byte-level BPE writes for them (GPT-2's table, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF: Final = _byte_level_alphabet()


def _named_byte(token: str) -> int | None:
    """The byte of a byte fallback token such as `<0xE4>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


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

    def token_bytes(self, token_id: int, *, begins_text: bool) -> bytes:
        return self[token_id]

    def left_context(self, token_ids: Sequence[int], hidden: Set[int]) -> Sequence[int]:
        """The last ids, as many as an incomplete character at the end may have."""
        context: list[int] = []
        num_bytes = 0
        for token_id in reversed(token_ids):
            if num_bytes >= _MAX_PENDING_BYTES:
                break
            if token_id not in hidden and (piece := self[token_id]):
                context.append(token_id)
                num_bytes += len(piece)
        return context[::-1]


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
        if (byte := _named_byte(token)) is not None:
            return byte
        return token if self._space is None else token.replace(self._space, " ")

    def token_bytes(self, token_id: int, *, begins_text: bool) -> bytes:
        piece = self[token_id]
        if isinstance(piece, int):
            return bytes([piece])
        piece = piece or ""
        num_lost = min(self.strip_left, len(piece) - len(piece.lstrip(" "))) if begins_text else 0
        return piece[num_lost:].encode()

    def left_context(self, token_ids: Sequence[int], hidden: Set[int]) -> Sequence[int]:
        """The incomplete end of the last run of bytes, and enough before it to decide which spaces the text loses."""
        texts: list[int] = []
        run: list[tuple[int, int]] = []
        for token_id in reversed(token_ids):
            piece = None if token_id in hidden else self[token_id]
            if isinstance(piece, int):
                if texts:
                    texts.append(token_id)  # one byte is enough: there is text before those spaces
                    break
                run.append((token_id, piece))
            elif piece:
                texts.append(token_id)
                if piece.strip(" ") or len(texts) > self.strip_left:
                    break
        return [*texts[::-1], *_rest_of_run(run[::-1])]


def _rest_of_run(run: Sequence[tuple[int, int]]) -> list[int]:
    """The ids of a run that put an assembler into the same state as the whole run: the last character and what follows
    it, or the first malformed bytes."""
    raw = bytes([byte for _, byte in run])
    try:
        _, start = codecs.utf_8_decode(raw, "strict", False)
        end = len(raw)
    except UnicodeDecodeError as error:
        return [token_id for token_id, _ in run[error.start : error.end + 1]]
    while start > 0:
        start -= 1
        if raw[start] & 0xC0 != 0x80:
            break
    return [token_id for token_id, _ in run[start:end]]


class WindowedPieces:
    """Any other tokenizer, which can only decode a list of ids.

    Args:
        decode: The text of a list of ids, special tokens included.
        knows: Whether the tokenizer has an id.
        spelling: The vocabulary's entry for an id.
        some_text: The ids of any text, after which single tokens are decoded.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        knows: Callable[[int], bool],
        spelling: Callable[[int], str],
        some_text: Sequence[int],
    ) -> None:
        self.decode = decode
        self.knows = knows
        self._spelling = spelling
        self._some_text = list(some_text)
        self._bytes: dict[tuple[int, bool], bytes] = {}

    def token_bytes(self, token_id: int, *, begins_text: bool) -> bytes:
        raw = self._bytes.get((token_id, begins_text))
        if raw is None:
            raw = self._bytes[token_id, begins_text] = self._read(token_id, [] if begins_text else self._some_text)
        return raw

    def _read(self, token_id: int, before: Sequence[int]) -> bytes:
        if not self.knows(token_id):
            return b""
        text = self.decode([*before, token_id])[len(self.decode(before)) :]
        if REPLACEMENT not in text:
            return text.encode()
        spelled = self._spelling(token_id)
        if (byte := _named_byte(spelled)) is not None:
            return bytes([byte])
        if all(char in _BYTE_OF for char in spelled):
            return bytes([_BYTE_OF[char] for char in spelled])
        return text.encode()

    def left_context(self, token_ids: Sequence[int], hidden: Set[int]) -> Sequence[int]:
        context: list[int] = []
        for token_id in reversed(token_ids):
            if len(context) == _WINDOW_CONTEXT:
                break
            if token_id not in hidden and self.knows(token_id):
                context.append(token_id)
        return context[::-1]


Pieces = ByteLevelPieces | ByteFallbackPieces | WindowedPieces


def read_pieces(backend: tokenizers.Tokenizer) -> ByteLevelPieces | ByteFallbackPieces | None:
    """The table for this tokenizer's decoder; None if only a window over its decode works."""
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
