"""`Echo`: a prompt's text as an answer repeats it, and the positions of its tokens in that text.

A prompt given as text is repeated unchanged, without the special tokens that the tokenizer added. A prompt given as
token ids, or truncated, is repeated as the text of its tokens, special tokens included.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

from tensorweave.cluster.protocol import TokenLogprobs
from tensorweave.router.text.token_offsets import PlacedToken, TokenOffsets
from tensorweave.router.text.tokens import Tokenizer

_OFFSETS: Final = "q"


@dataclass(frozen=True, slots=True)
class Echo:
    """The part of the prompt that an answer repeats.

    Attributes:
        text: The prompt's text.
        context: Its last ids, after which the answer's text continues.
        offsets: `PlacedToken.offset` of each token; empty if the tokens are not returned.
        owns: `PlacedToken.own` of each token.
        begin_text: `PlacedToken.begins_text` of each token.
    """

    text: str
    context: Sequence[int] = ()
    offsets: Sequence[int] = ()
    owns: Sequence[str | bytes | None] = ()
    begin_text: Sequence[bool] = ()

    @classmethod
    def of(cls, text: str, context: Sequence[int], tokens: Sequence[PlacedToken]) -> Echo:
        columns = zip(*[(token.offset, token.own, token.begins_text) for token in tokens], strict=True)
        return cls(text, context, *columns)

    def pack(self) -> list[Any]:
        """As msgpack fields, because large bodies are parsed in another process."""
        offsets = array.array(_OFFSETS, self.offsets).tobytes()
        return [self.text, list(self.context), offsets, list(self.owns), bytes(self.begin_text)]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Echo:
        text, context, offsets, owns, begin_text = packed
        columns = (array.array(_OFFSETS, offsets), owns, map(bool, begin_text))
        return cls(text, tuple(context), *map(tuple, columns))


class EchoedTokens(Sequence[PlacedToken]):
    """The tokens of an echo with their log-probabilities, made slice by slice: a prompt may have 100,000 tokens."""

    def __init__(self, echo: Echo, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        self._echo = echo
        self._token_ids = token_ids
        self._logprobs = logprobs
        """Of all tokens but the first."""

    def __len__(self) -> int:
        return len(self._token_ids)

    @overload
    def __getitem__(self, place: int) -> PlacedToken: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PlacedToken]: ...

    def __getitem__(self, place: int | slice) -> PlacedToken | Sequence[PlacedToken]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        index, echo = range(len(self))[place], self._echo
        logprobs = self._logprobs[index - 1] if index else ()
        return PlacedToken(
            self._token_ids[index], logprobs, echo.offsets[index], echo.owns[index], echo.begin_text[index]
        )


@dataclass(frozen=True, slots=True)
class EchoRequest:
    """What to repeat.

    Attributes:
        token_ids: The prompt, checked against the model's vocabulary.
        given: Its text, if it was given as text and is not truncated.
        num_added: How many ids the tokenizer added before and after that text.
        has_tokens: The tokens are returned too.
        is_all: No output follows, so an incomplete character stays incomplete.
    """

    token_ids: Sequence[int]
    given: str | None
    num_added: tuple[int, int]
    has_tokens: bool
    is_all: bool


def read_echo(tokenizer: Tokenizer, asked: EchoRequest) -> Echo:
    """The given text, unless tokens are returned: those of a tokenizer that normalizes may have another text."""
    first, last = _shown(tokenizer, asked)
    context = tuple(tokenizer.left_context(asked.token_ids[first:last], skip_special_tokens=False))
    if asked.given is not None and not asked.has_tokens:
        return Echo(asked.given, context)
    tokens = TokenOffsets(tokenizer, tokenizer.assembler(skip_special_tokens=False), 0)
    text = tokens.add(asked.token_ids[first:last])
    if asked.is_all:
        text += tokens.finish()
    if not asked.has_tokens:
        return Echo(text, context)
    before = [PlacedToken(token_id, (), 0) for token_id in asked.token_ids[:first]]
    after = [PlacedToken(token_id, (), len(text)) for token_id in asked.token_ids[last:]]
    return Echo.of(text, context, [*before, *tokens.end(len(text)), *after])


def _shown(tokenizer: Tokenizer, asked: EchoRequest) -> tuple[int, int]:
    """The range of the ids that are part of the text."""
    num_ids = len(asked.token_ids)
    if asked.given is None:
        return 0, num_ids
    first, num_after = asked.num_added
    last = num_ids - num_after
    added = [*asked.token_ids[:first], *asked.token_ids[last:]]
    return (first, last) if all(token_id in tokenizer.special_ids for token_id in added) else (0, num_ids)
