"""`WholeChoice`: one choice of an answer that is not streamed, written to JSON as its tokens arrive.

Token ids and log-probabilities may be hundreds of times as long as the text. Writing them at the end would block the
event loop for seconds; written chunk by chunk, they cost each step as much as a stream does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import orjson

from tensorweave.router.chat.blocks import Blocks
from tensorweave.router.chat.parsed_choice import ParsedChunk
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.text.choices import ChoiceChunk, PromptDetails, Telling
from tensorweave.router.text.token_offsets import PlacedToken
from tensorweave.router.time_slice import TimeSlice

T = TypeVar("T")

_ROWS: Final = 64
"""Tokens that are written at a time: with 20 likeliest each, about 2 ms."""

Columns = Callable[[Sequence[PlacedToken]], dict[str, list[Any]]]


class JsonList:
    """A JSON list that is written part by part."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def extend(self, values: Sequence[Any]) -> None:
        if values:
            self._parts.append(orjson.dumps(values)[1:-1])

    def json(self) -> bytes:
        return b"[%b]" % b",".join(self._parts)


class LogprobsJson:
    """The `logprobs` of a choice. `columns` returns its lists for some tokens; `more` is its other fields."""

    def __init__(self, columns: Columns, more: bytes = b"") -> None:
        self._columns = columns
        self._more = more
        self._lists = {name: JsonList() for name in columns(())}

    async def add(self, chunk: ChoiceChunk, time_slice: TimeSlice) -> None:
        for rows in itertools.chain(slices(chunk.echoed), slices(chunk.tokens)):
            for name, values in self._columns(rows).items():
                self._lists[name].extend(values)
            await time_slice.checkpoint()

    def json(self) -> bytes:
        fields = [b'"%b":%b' % (name.encode(), values.json()) for name, values in self._lists.items()]
        return b"{%b%b}" % (b",".join(fields), self._more)


class WholeChoice:
    """Add every chunk of the choice, then read the properties."""

    def __init__(self, telling: Telling, shapes: TokenShapes, logprobs: LogprobsJson | None) -> None:
        self._telling = telling
        self._shapes = shapes
        self._logprobs = logprobs
        self._time_slice = TimeSlice()
        self._token_ids = JsonList()
        self._last: ParsedChunk | None = None
        self.blocks = Blocks()
        self.prompt_fields = b""
        """The prompt's JSON fields, each after a comma."""

    async def add(self, chunk: ParsedChunk) -> None:
        self._last, piece = chunk, chunk.piece
        self.blocks.collect(chunk.deltas)
        if self._telling.has_token_ids:
            self._token_ids.extend([token.token_id for token in piece.tokens])
        if self._logprobs is not None:
            await self._logprobs.add(piece, self._time_slice)
        if piece.prompt is not None:
            self.prompt_fields = await prompt_fields(piece.prompt, self._telling, self._shapes, self._time_slice)

    @property
    def last(self) -> ParsedChunk:
        """The chunk with the finish reason."""
        assert self._last is not None, "a choice has at least one chunk"
        return self._last

    @property
    def logprobs(self) -> bytes:
        return b"null" if self._logprobs is None else self._logprobs.json()

    @property
    def token_fields(self) -> bytes:
        return b',"token_ids":' + self._token_ids.json() if self._telling.has_token_ids else b""


async def prompt_fields(prompt: PromptDetails, telling: Telling, shapes: TokenShapes, time_slice: TimeSlice) -> bytes:
    """The prompt's JSON fields, each after a comma."""
    fields = b""
    if telling.has_token_ids:
        fields += b',"prompt_token_ids":' + orjson.dumps(list(prompt.token_ids))
    if telling.num_prompt_logprobs is not None:
        assert prompt.logprobs is not None, "the first token came without the prompt's log-probabilities"
        rows_json = JsonList()
        rows_json.extend([None])  # of the first token
        for rows in slices(prompt.logprobs):
            rows_json.extend(shapes.prompt_logprobs(rows, telling.num_prompt_logprobs))
            await time_slice.checkpoint()
        fields += b',"prompt_logprobs":' + rows_json.json()
    return fields


def slices(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    return (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
