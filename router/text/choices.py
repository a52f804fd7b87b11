"""`ChoiceStream`: the chunks of one choice of an answer, with text and tokens synchronized.

Text is held back while a character or a stop string may be incomplete. A token is sent once all of its text has been
sent; those without text (special tokens, the one that ended the sequence) are sent by the end at the latest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorweave.cluster.protocol import FinishReason, TokenLogprobs
from tensorweave.router.text.echo import Echo, EchoedTokens
from tensorweave.router.text.token_offsets import PlacedToken, TokenOffsets
from tensorweave.router.text.tokens import Tokenizer

if TYPE_CHECKING:
    from tensorweave.router.text.generation import TextDelta


@dataclass(frozen=True, slots=True)
class Telling:
    """What an answer contains beside its text.

    Attributes:
        num_logprobs: Number of likeliest tokens with each token; None for none. With an echo, the prompt's too.
        num_prompt_logprobs: The same for the prompt's tokens, in a field of their own.
        has_token_ids: Prompt and choices have token ids.
        has_echo: The prompt is repeated.
        has_output: False if only the echo is wanted.
        is_ranked: More sequences are generated than returned.
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
    """One prompt of a request; `echo` if it is to be repeated."""

    token_ids: Sequence[int]
    echo: Echo | None = None

    def left_context(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()
    ) -> Sequence[int]:
        """The last ids of the prompt, after which an answer's text continues."""
        if self.echo is not None:
            return self.echo.context
        return tokenizer.left_context(self.token_ids, skip_special_tokens=skip_special_tokens, shown=shown)


@dataclass(frozen=True, slots=True)
class PromptDetails:
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None


@dataclass(frozen=True, slots=True)
class ChoiceChunk:
    """A part of a choice; the one with a finish reason is the last. Joined, the parts are the choice.

    `echoed` (the prompt's tokens) and `prompt` are in the first one, if they were requested.
    """

    index: int
    text: str
    tokens: Sequence[PlacedToken] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    echoed: Sequence[PlacedToken] = ()
    prompt: PromptDetails | None = None


class ChoiceStream:
    """One per sequence. `add` takes every delta and returns a chunk if there is something to send.

    Args:
        index: The choice's index in the answer.
        telling: What is sent beside the text.
        prompt: The sequence's prompt.
        tokenizer: The model's tokenizer.
        context: These three as in the sequence's `IncrementalDetokenizer`.
        skip_special_tokens: See there.
        spaces_between_special_tokens: See there.
        shown: See there.
    """

    def __init__(
        self,
        index: int,
        telling: Telling,
        prompt: Prompt,
        tokenizer: Tokenizer,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._index = index
        self._telling = telling
        self._prompt = prompt
        self._echo = prompt.echo or Echo("")
        self._has_begun = False
        self._num_chars = len(self._echo.text)
        self._tokens: TokenOffsets | None = None
        if telling.has_tokens:
            assembler = tokenizer.assembler(
                context,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
                shown=shown,
            )
            skipped = tokenizer.skipped_ids(skip_special_tokens=skip_special_tokens, shown=shown)
            self._tokens = TokenOffsets(tokenizer, assembler, self._num_chars, skipped)
        self._prompt_logprobs: Sequence[TokenLogprobs] | None = None
        self._sum_logprobs = 0.0
        self._num_tokens = 0

    def add(self, delta: TextDelta) -> ChoiceChunk | None:
        self._num_tokens += len(delta.token_ids)
        self._sum_logprobs += sum([own.logprob for own, *_ in delta.logprobs])
        self._num_chars += len(delta.text)
        is_last = delta.finish_reason is not None
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        if self._tokens is not None:
            self._tokens.add(delta.token_ids, delta.logprobs)
        begins = not self._has_begun
        text = self._echo.text + delta.text if begins else delta.text
        if not text and not is_last:
            return None
        self._has_begun = True
        tokens: Sequence[PlacedToken] = ()
        if self._tokens is not None:
            tokens = self._tokens.end(self._num_chars) if is_last else self._tokens.release(self._num_chars)
        chunk = ChoiceChunk(self._index, text, tokens, delta.finish_reason, delta.stop_reason)
        return self._with_prompt(chunk) if begins else chunk

    @property
    def mean_logprob(self) -> float:
        """For choosing the best of several sequences."""
        return self._sum_logprobs / max(self._num_tokens, 1)

    def _with_prompt(self, chunk: ChoiceChunk) -> ChoiceChunk:
        telling, ids, logprobs = self._telling, self._prompt.token_ids, self._prompt_logprobs
        echoed: Sequence[PlacedToken] = ()
        if self._echo.offsets:
            assert logprobs is not None, "the first token came without the prompt's log-probabilities"
            echoed = EchoedTokens(self._echo, ids, logprobs)
        details = PromptDetails(ids, logprobs) if telling.has_prompt else None
        return dataclasses.replace(chunk, echoed=echoed, prompt=details)
