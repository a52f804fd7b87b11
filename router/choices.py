"""`ChoiceStream`: what one sequence of an answer says at each step, text and tokens in step with each other.

Text is held back while a character or a stop string may be incomplete. A token is told, once, when all of its text has
been; those that leave no text (special tokens, the one that ended the sequence) are told by the end at the latest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorweave.cluster.protocol import FinishReason, TokenLogprobs
from tensorweave.router.pieces import Pieces, TextAssembler, assemble
from tensorweave.router.tokens import Tokenizer

if TYPE_CHECKING:
    from tensorweave.router.generation import TextDelta


@dataclass(frozen=True, slots=True)
class Telling:
    """What an answer says beside its text.

    `num_logprobs`: so many likeliest tokens with each token, or None; with an echo, with the prompt's tokens too.
    `num_prompt_logprobs`: those of the prompt, apart. `has_output`: False where only the echo is wanted. `is_ranked`:
    more sequences are generated than are told.
    """

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    has_token_ids: bool = False
    has_echo: bool = False
    has_output: bool = True
    is_ranked: bool = False

    @property
    def has_tokens(self) -> bool:
        return self.num_logprobs is not None or self.has_token_ids

    @property
    def has_prompt(self) -> bool:
        return self.has_token_ids or self.num_prompt_logprobs is not None

    @property
    def num_output_logprobs(self) -> int | None:
        return 0 if self.num_logprobs is None and self.is_ranked else self.num_logprobs

    @property
    def num_computed_prompt_logprobs(self) -> int | None:
        wanted = [self.num_prompt_logprobs, self.num_logprobs if self.has_echo else None]
        return max((number for number in wanted if number is not None), default=None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request; `text` is what an echo repeats."""

    token_ids: Sequence[int]
    text: str = ""


@dataclass(frozen=True, slots=True)
class ToldToken:
    """`logprobs` is empty for a prompt's first token, and where none were asked for. `offset`: in the choice's text."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True, slots=True)
class ToldPrompt:
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """What a choice says now; one with a finish reason is its last. All of them joined are the choice.

    `echoed` (the prompt's tokens) and `prompt` come with the first one, where they were asked for.
    """

    index: int
    text: str
    tokens: Sequence[ToldToken] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    echoed: Sequence[ToldToken] = ()
    prompt: ToldPrompt | None = None


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    last = pieces[-1]
    return dataclasses.replace(
        last,
        text="".join([piece.text for piece in pieces]),
        tokens=[token for piece in pieces for token in piece.tokens],
        echoed=pieces[0].echoed,
        prompt=pieces[0].prompt,
    )


class ChoiceStream:
    """Of one sequence. Feed it every delta; it answers with a piece whenever there is something to say."""

    def __init__(
        self, index: int, telling: Telling, prompt: Prompt, tokenizer: Tokenizer, *, skip_special_tokens: bool = True
    ) -> None:
        self._index = index
        self._telling = telling
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._has_begun = False
        self._num_chars = len(prompt.text) if telling.has_echo else 0
        self._track: TokenTrack | None = None
        if telling.has_tokens:
            self._track = TokenTrack(self._assembler(skips_special=skip_special_tokens), self._num_chars)
        self._prompt_logprobs: Sequence[TokenLogprobs] | None = None
        self._sum_logprobs = 0.0
        self._num_tokens = 0

    def add(self, delta: TextDelta) -> Piece | None:
        self._num_tokens += len(delta.token_ids)
        self._sum_logprobs += sum([own.logprob for own, *_ in delta.logprobs])
        self._num_chars += len(delta.text)
        is_last = delta.finish_reason is not None
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        if self._track is not None:
            self._track.add(delta.token_ids, delta.logprobs)
        begins = not self._has_begun
        text = self._prompt.text + delta.text if begins and self._telling.has_echo else delta.text
        if not text and not is_last:
            return None
        self._has_begun = True
        tokens: Sequence[ToldToken] = ()
        if self._track is not None:
            tokens = self._track.end(self._num_chars) if is_last else self._track.release(self._num_chars)
        piece = Piece(self._index, text, tokens, delta.finish_reason, delta.stop_reason)
        return self._with_prompt(piece) if begins else piece

    @property
    def mean_logprob(self) -> float:
        """By which the best of several are chosen."""
        return self._sum_logprobs / max(self._num_tokens, 1)

    def _with_prompt(self, piece: Piece) -> Piece:
        telling, ids, logprobs = self._telling, self._prompt.token_ids, self._prompt_logprobs
        echoed: Sequence[ToldToken] = ()
        if telling.has_echo and telling.num_logprobs is not None:
            assert logprobs is not None, "the first token came without the prompt's log-probabilities"
            echoed = list(map(ToldToken, ids, [(), *logprobs], self._prompt_offsets()))
        told = ToldPrompt(ids, logprobs) if telling.has_prompt else None
        return dataclasses.replace(piece, echoed=echoed, prompt=told)

    def _prompt_offsets(self) -> list[int]:
        """Where each prompt token begins in the prompt's text. Which special tokens the text shows depends on how it
        came to be; where neither way gives the text, the offsets are near."""
        ids, text = self._prompt.token_ids, self._prompt.text
        for skips_special in (self._skips_special, not self._skips_special):
            offsets, whole = token_offsets(self._assembler(skips_special=skips_special), ids)
            if whole == text:
                break
        return [min(offset, len(text)) for offset in offsets]

    def _assembler(self, *, skips_special: bool) -> TextAssembler:
        pieces: Pieces = self._tokenizer.pieces(skip_special_tokens=skips_special, spaces_between_special_tokens=True)
        return assemble(pieces, self._tokenizer.special_ids if skips_special else frozenset())


class TokenTrack:
    """Where each token's text lies, and which tokens may be told."""

    def __init__(self, assembler: TextAssembler, num_chars: int) -> None:
        self._assembler = assembler
        self._num_chars = num_chars
        self._waiting: list[tuple[ToldToken, int | None]] = []
        """With the end of its text; None for a token that ends within a character."""

    def add(self, token_ids: Iterable[int], logprobs: Sequence[TokenLogprobs]) -> None:
        for place, token_id in enumerate(token_ids):
            start = self._num_chars
            self._num_chars += len(self._assembler.add((token_id,)))
            told = ToldToken(token_id, logprobs[place] if logprobs else (), start)
            self._waiting.append((told, self._num_chars if self._assembler.is_whole else None))

    def release(self, num_chars: int) -> list[ToldToken]:
        """Those whose text lies within the first `num_chars` characters, each once."""
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

    def end(self, num_chars: int) -> list[ToldToken]:
        """All that wait: no more text comes than `num_chars` characters."""
        rest = [dataclasses.replace(token, offset=min(token.offset, num_chars)) for token, _ in self._waiting]
        self._waiting.clear()
        return rest


def token_offsets(assembler: TextAssembler, token_ids: Sequence[int]) -> tuple[list[int], str]:
    """Where each token's text begins, and the whole text."""
    offsets: list[int] = []
    parts: list[str] = []
    num_chars = 0
    for token_id in token_ids:
        offsets.append(num_chars)
        parts.append(assembler.add((token_id,)))
        num_chars += len(parts[-1])
    return offsets, "".join(parts) + assembler.finish()
