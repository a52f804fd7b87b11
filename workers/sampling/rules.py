"""The sampling rules that a `SamplingSpec` can ask for. `make_rules` makes those that a given spec asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.sampling.logit_edits import Floats, Ints, LogitEdits
from tensorweave.workers.sampling.state import SamplingRule, TokenHistory


def make_rules(spec: SamplingSpec, history: TokenHistory) -> Iterator[SamplingRule]:
    if spec.logit_bias or spec.embedding_bias:
        yield Bias(spec)
    if spec.min_tokens and spec.stop_token_ids:
        yield MinTokens(spec, history)
    if spec.no_repeat_ngram_size:
        yield NoRepeatedNgram(spec, history)
    if spec.bad_words:
        yield BadWords(spec, history)
    if spec.repetition_penalty != 1.0 or spec.presence_penalty or spec.frequency_penalty:
        yield Penalties(spec, history)
    if spec.top_p_decay != 1.0 and not spec.is_greedy:
        yield TopPDecay(spec, history)


class Bias(SamplingRule):
    reads_tokens = False

    def __init__(self, spec: SamplingSpec) -> None:
        self._ids: Ints = np.array([token for token, _ in spec.logit_bias], dtype=np.int64)
        self._values: Floats = np.array([bias for _, bias in spec.logit_bias], dtype=np.float32)
        self._bias_V = torch.from_numpy(np.frombuffer(spec.embedding_bias, dtype="<f4").astype(np.float32))

    def edit(self, row: int, edits: LogitEdits) -> None:
        if len(self._ids):
            edits.add(row, self._ids, self._values)
        if len(self._bias_V):
            edits.add_to_all(row, self._bias_V)


class MinTokens(SamplingRule):
    """No stop token before `min_tokens` are out."""

    reads_tokens = False
    only_bans = True

    def __init__(self, spec: SamplingSpec, history: TokenHistory) -> None:
        self._spec = spec
        self._history = history

    def edit(self, row: int, edits: LogitEdits) -> None:
        if self._history.position - self._history.prompt_len < self._spec.min_tokens:
            edits.ban(row, self._spec.stop_token_ids)


class NoRepeatedNgram(SamplingRule):
    """Remembers which tokens have followed each sequence of n - 1 tokens."""

    only_bans = True

    def __init__(self, spec: SamplingSpec, history: TokenHistory) -> None:
        self._size = spec.no_repeat_ngram_size
        self._history = history
        self._followers: dict[tuple[int, ...], list[int]] = {}
        self._take_in(0)

    def advance(self, tokens: Sequence[int]) -> None:
        self._take_in(len(self._history.tokens) - len(tokens))

    def roll_back(self, num_tokens: int) -> None:
        tokens = self._history.tokens
        for at in reversed(range(max(len(tokens) - num_tokens, self._size - 1), len(tokens))):
            self._followers[self._prefix(at)].pop()

    def edit(self, row: int, edits: LogitEdits) -> None:
        edits.ban(row, sorted(set(self._followers.get(self._prefix(len(self._history.tokens)), ()))))

    def _take_in(self, start: int) -> None:
        for at in range(max(start, self._size - 1), len(self._history.tokens)):
            self._followers.setdefault(self._prefix(at), []).append(self._history.tokens[at])

    def _prefix(self, at: int) -> tuple[int, ...]:
        """The n - 1 tokens before place `at`."""
        return tuple(self._history.tokens[max(0, at - self._size + 1) : at])


class BadWords(SamplingRule):
    """No word is completed; its beginning may stand in the prompt."""

    only_bans = True

    def __init__(self, spec: SamplingSpec, history: TokenHistory) -> None:
        self._words = spec.bad_words
        self._history = history

    def edit(self, row: int, edits: LogitEdits) -> None:
        tokens = self._history.tokens
        edits.ban(row, [word[-1] for word in self._words if tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1]])


class Penalties(SamplingRule):
    """Repetition, presence and frequency penalties. Only the repetition penalty looks at the prompt."""

    only_penalises = True

    def __init__(self, spec: SamplingSpec, history: TokenHistory) -> None:
        self._spec = spec
        self._history = history
        self._counts = TokenCounts(history.tokens if spec.repetition_penalty != 1.0 else ())

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._counts.add(token)

    def roll_back(self, num_tokens: int) -> None:
        for token in reversed(self._history.tokens[len(self._history.tokens) - num_tokens :]):
            self._counts.remove_newest(token)

    def edit(self, row: int, edits: LogitEdits) -> None:
        edits.penalise(row, self._counts.ids, self._counts.counts, self._spec)


class TokenCounts:
    """The distinct tokens of prompt and output, and how often each is in the output."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._num_prompt = len(self._places)
        self._ids: Ints = np.fromiter(self._places, dtype=np.int64, count=self._num_prompt)
        self._counts: Floats = np.zeros(self._num_prompt, dtype=np.float32)

    @property
    def ids(self) -> Ints:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self._new_place(token)
        self._counts[place] += 1

    def remove_newest(self, token: int) -> None:
        """Undo the newest `add`. Where that was the token's first, its place is the last one."""
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place] == 0 and place >= self._num_prompt:
            del self._places[token]

    def _new_place(self, token: int) -> int:
        place = self._places[token] = len(self._places)
        if place == len(self._ids):
            room = max(64, place)
            self._ids = np.concatenate([self._ids, np.empty(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.empty(room, dtype=np.float32)])
        self._ids[place], self._counts[place] = token, 0.0
        return place


class TopPDecay(SamplingRule):
    """Each token of the output multiplies top_p, down to a minimum, until the token that resets it."""

    def __init__(self, spec: SamplingSpec, history: TokenHistory) -> None:
        self._spec = spec
        self._history = history
        self._num_since_reset = 0

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._num_since_reset = 0 if token == self._spec.top_p_reset_ids else self._num_since_reset + 1

    def roll_back(self, num_tokens: int) -> None:
        history = self._history
        self._num_since_reset = 0
        self.advance(history.tokens[history.prompt_len : len(history.tokens) - num_tokens])

    def edit(self, row: int, edits: LogitEdits) -> None:
        spec = self._spec
        decayed = spec.top_p * spec.top_p_decay**self._num_since_reset
        edits.top_p[row] = max(decayed, min(spec.top_p, spec.top_p_min))
