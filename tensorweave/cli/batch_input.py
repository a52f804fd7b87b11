"""The input of a batch: a JSON Lines file in OpenAI's format, read a line at a time, and `LineIndex`, which knows all
its lines without holding them in memory."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_MAX_LINE_BYTES: Final = 256 << 20
_CACHE_KIB: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line that can be sent."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.custom_id, self.number)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a request. Its `custom_id` is None where it has none."""

    number: int
    custom_id: str | None
    code: str
    message: str

    @property
    def key(self) -> str:
        return key_of(self.custom_id, self.number)


Line = BatchRequest | BadLine


def key_of(custom_id: str | None, number: int) -> str:
    """What identifies a line from run to run: its custom_id (as JSON, so that any text is valid UTF-8), else its
    number."""
    return str(number) if custom_id is None else json.dumps(custom_id)


def read_lines(path: Path) -> Iterator[Line]:
    """All lines but blank ones. Numbers start at 1."""
    with path.open("rb") as file:
        number = 0
        while text := file.readline(_MAX_LINE_BYTES):
            number += 1
            if len(text) == _MAX_LINE_BYTES and not text.endswith(b"\n"):
                raise ValueError(f"{path}: line {number} is longer than {_MAX_LINE_BYTES >> 20} MiB")
            if text.strip():
                yield parse_line(text, number)


def parse_line(text: bytes, number: int) -> Line:
    try:
        fields = load_json(text)
    except ValueError as error:
        return BadLine(number, None, "invalid_json", f"line {number} is not JSON: {error}")
    custom_id = fields.get("custom_id") if isinstance(fields, dict) else None
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, "invalid_request", f"line {number} has no custom_id, a text that is not empty")
    if problem := _problem(fields):
        return BadLine(number, custom_id, "invalid_request", f"line {number}: {problem}")
    return BatchRequest(number, custom_id, fields["url"], fields["body"])


def load_json(text: bytes) -> Any:
    """Raises ValueError for all that is not JSON, NaN and what is nested too deeply included."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _problem(fields: dict[str, Any]) -> str | None:
    method, url, body = fields.get("method"), fields.get("url"), fields.get("body")
    if method != "POST":
        return "method must be POST"
    if url not in ENDPOINTS:
        return f"url must be one of {', '.join(ENDPOINTS)}"
    if not isinstance(body, dict):
        return "body must be an object"
    if body.get("stream"):
        return "body.stream: answers of a batch are whole; leave it out"
    return None


class LineIndex:
    """Which lines the input has, and which of them are done. SQLite keeps it in a private temporary file, so that the
    memory is bounded."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._rows.execute("CREATE TABLE lines (key TEXT PRIMARY KEY, number INTEGER, is_done INTEGER) WITHOUT ROWID")
        self.total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def fill(self, lines: Iterable[Line]) -> None:
        """Raises ValueError if two lines have the same custom_id; it names both."""
        self._rows.execute("BEGIN")
        for line in lines:
            row = (line.key, line.number)
            if self._rows.execute("INSERT OR IGNORE INTO lines VALUES (?, ?, 0)", row).rowcount == 0:
                (first,) = self._rows.execute("SELECT number FROM lines WHERE key = ?", row[:1]).fetchone()
                raise ValueError(f"line {line.number} has the custom_id of line {first}, {line.custom_id!r}")
            self.total += 1
        self._rows.execute("COMMIT")

    def mark_done(self, keys: Iterable[str]) -> int:
        """Return how many of these are lines of the input that were not done before."""
        self._rows.execute("BEGIN")
        marking = "UPDATE lines SET is_done = 1 WHERE key = ? AND is_done = 0"
        count = sum(self._rows.execute(marking, (key,)).rowcount for key in keys)
        self._rows.execute("COMMIT")
        return count

    def open_lines(self, lines: Iterable[Line]) -> Iterator[Line]:
        """The lines that are not done. Raises ValueError at a line that `fill` has not seen."""
        for line in lines:
            row = self._rows.execute("SELECT number, is_done FROM lines WHERE key = ?", (line.key,)).fetchone()
            if row is None or row[0] != line.number:
                raise ValueError(f"line {line.number} of the input has changed since the start")
            if not row[1]:
                yield line
