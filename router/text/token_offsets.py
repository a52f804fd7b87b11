"""`TokenOffsets`: the position of each token in a text, returned once the token's text has been."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensorweave.cluster.protocol import TokenLogprobs
from tensorweave.router.text.assembly import TextAssembler, TokenText
from tensorweave.router.text.pieces import REPLACEMENT
from tensorweave.router.text.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token of a choice, with its position in the choice's text.

    Attributes:
        token_id: Its id.
        logprobs: Empty for a prompt's first token, and if none were requested.
        offset: Index of its first character in the text.
        own: Its part of the text; bytes if these are not complete characters; None if it has no part in the text (a
            skipped special token, or one that the tokenizer added to a prompt given as text).
        begins_text: There is no text before it.
    """

    token_id: int
    logprobs: TokenLogprobs
    offset: int
    own: str | bytes | None = None
    begins_text: bool = False


class TokenOffsets:
    """Takes the same tokens as an `IncrementalDetokenizer`, with an assembler like its own."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        assembler: TextAssembler,
        num_chars: int,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._assembler = assembler
        self._num_chars = num_chars
        self._skipped = skipped
        self._waiting: list[tuple[PlacedToken, int | None]] = []
        """Each with the end of its text; None if the token ends within a character."""

    def add(self, token_ids: Iterable[int], logprobs: Sequence[TokenLogprobs] = ()) -> str:
        """The text that these ids complete."""
        texts: list[str] = []
        for place, token_id in enumerate(token_ids):
            begins_text = self._assembler.is_at_start
            step = self._assembler.add_one(token_id)
            start = self._num_chars + step.begin
            self._num_chars += len(step.text)
            self._move_back(start)
            token = PlacedToken(
                token_id, logprobs[place] if logprobs else (), start, self._own(token_id, step), begins_text
            )
            self._waiting.append((token, self._num_chars if self._assembler.is_whole else None))
            texts.append(step.text)
        return "".join(texts)

    def finish(self) -> str:
        """The incomplete text at the end."""
        text = self._assembler.finish()
        self._num_chars += len(text)
        return text

    def release(self, num_chars: int) -> list[PlacedToken]:
        """Remove and return the tokens whose text lies within the first `num_chars` characters."""
        num_ready = 0
        for place, (_, end) in enumerate(self._waiting, start=1):
            if end is None:
                continue
            if end > num_chars:
                break
            num_ready = place
        ready = [token for token, _ in self._waiting[:num_ready]]
        del self._waiting[:num_ready]
        return ready

    def end(self, num_chars: int) -> list[PlacedToken]:
        """Remove and return all tokens; the text ends after `num_chars` characters."""
        rest = [
            token if token.offset <= num_chars else dataclasses.replace(token, offset=num_chars)
            for token, _ in self._waiting
        ]
        self._waiting.clear()
        return rest

    def _move_back(self, start: int) -> None:
        """Correct tokens that are part of a character which begins at `start`."""
        for place in range(len(self._waiting) - 1, -1, -1):
            token, end = self._waiting[place]
            if end is not None or token.offset <= start:
                return
            self._waiting[place] = (dataclasses.replace(token, offset=start), end)

    def _own(self, token_id: int, step: TokenText) -> str | bytes | None:
        if token_id in self._skipped:
            return None
        text = step.text[step.begin :]
        if not step.is_part and REPLACEMENT not in text:
            return text
        raw = self._tokenizer.token_bytes(token_id)
        return text if not step.is_part and raw == text.encode() else raw
