"""What stands between the model's logits and the choice of a token: biases, bans and penalties, on many rows at once.

Per request a `SamplingHistory` follows its tokens, so that a step costs what the new token adds, not the whole text.
Order: biases, bans, repetition penalty, presence and frequency penalties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensorweave.workers.step.request import LlmRequest

# R rows of logits, V vocabulary

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]


class TokenCounts:
    """The distinct tokens so far, in the order they came, and how often each is in the output."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids: _Ints = np.empty(64, dtype=np.int64)
        self._counts: _Floats = np.empty(64, dtype=np.float32)

    def add(self, tokens: Sequence[int], *, is_output: bool) -> None:
        for token in tokens:
            place = self._places.get(token)
            if place is None:
                place = self._new_place(token)
            self._counts[place] += is_output

    @property
    def ids(self) -> _Ints:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> _Floats:
        return self._counts[: len(self._places)]

    def _new_place(self, token: int) -> int:
        place = self._places[token] = len(self._places)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
        self._ids[place], self._counts[place] = token, 0.0
        return place


class SamplingHistory:
    """What one request's sampling must remember of its tokens. A replay or a pause changes nothing: all follows from
    the tokens and where the output begins."""

    def __init__(self, request: LlmRequest) -> None:
        spec = request.sampling
        self.bias_ids: _Ints = np.array([token for token, _ in spec.logit_bias], dtype=np.int64)
        self.bias_values: _Floats = np.array([bias for _, bias in spec.logit_bias], dtype=np.float32)
        self.embedding_bias_V = torch.from_numpy(np.frombuffer(spec.embedding_bias, dtype="<f4").astype(np.float32))
        self.has_penalty = spec.repetition_penalty != 1.0 or bool(spec.presence_penalty or spec.frequency_penalty)
        self.counts = TokenCounts()
        self._spec = spec
        self._num_seen = 0
        self._followers: dict[tuple[int, ...], set[int]] = {}
        self._num_since_reset = 0

    def catch_up(self, request: LlmRequest) -> None:
        """Take in the tokens that have come since the last time."""
        tokens, seen, spec = request.tokens, self._num_seen, self._spec
        if seen == len(tokens):
            return
        new_output = tokens[max(seen, request.prompt_len) :]
        if self.has_penalty:
            if spec.repetition_penalty != 1.0:
                self.counts.add(tokens[seen : request.prompt_len], is_output=False)
            self.counts.add(new_output, is_output=True)
        if size := spec.no_repeat_ngram_size:
            for at in range(max(seen, size - 1), len(tokens)):
                self._followers.setdefault(tuple(tokens[at - size + 1 : at]), set()).add(tokens[at])
        if spec.top_p_decay != 1.0:
            for token in new_output:
                self._num_since_reset = 0 if token == spec.top_p_reset_id else self._num_since_reset + 1
        self._num_seen = len(tokens)

    @property
    def top_p(self) -> float:
        """Decayed by each token since the last reset, but not below its minimum."""
        spec = self._spec
        return max(spec.top_p * spec.top_p_decay**self._num_since_reset, min(spec.top_p, spec.top_p_min))

    def bans(self, request: LlmRequest) -> Iterator[int]:
        """Tokens that must not come next."""
        tokens, spec = request.tokens, self._spec
        if request.num_output < spec.min_tokens:
            yield from spec.stop_token_ids
        if size := spec.no_repeat_ngram_size:
            yield from sorted(self._followers.get(tuple(tokens[len(tokens) - size + 1 :]), ()))
        for word in spec.bad_words:
            if tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1]:
                yield word[-1]


def follow(request: LlmRequest) -> SamplingHistory:
    """The request's history, up to date."""
    history = request.history or SamplingHistory(request)
    request.history = history
    history.catch_up(request)
    return history


def edit_logits(logits_RV: Tensor, edited: Sequence[tuple[int, LlmRequest]]) -> None:
    """Change these rows in place, each as its request's sampling says."""
    histories = [(row, request, follow(request)) for row, request in edited]
    biases = [(row, h.bias_ids, h.bias_values) for row, _, h in histories if len(h.bias_ids)]
    if biases:
        values = torch.from_numpy(np.concatenate([values for _, _, values in biases])).to(logits_RV.device)
        logits_RV.index_put_(_places(biases, logits_RV), values, accumulate=True)
    for row, _, history in histories:
        if len(history.embedding_bias_V):
            logits_RV[row] += history.embedding_bias_V.to(logits_RV.device)
    bans = [(row, np.fromiter(h.bans(request), dtype=np.int64)) for row, request, h in histories]
    bans = [(row, ids) for row, ids in bans if len(ids)]
    if bans:
        logits_RV[_places(bans, logits_RV)] = -torch.inf
    _penalise(logits_RV, [(row, request, h.counts) for row, request, h in histories if h.has_penalty])


def _penalise(logits_RV: Tensor, penalised: Sequence[tuple[int, LlmRequest, TokenCounts]]) -> None:
    penalised = [item for item in penalised if len(item[2].ids)]
    if not penalised:
        return
    lengths = [len(counts.ids) for _, _, counts in penalised]
    specs = [request.sampling for _, request, _ in penalised]

    def spread(numbers: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(numbers, dtype=np.float32), lengths)).to(logits_RV.device)

    repetition = spread([spec.repetition_penalty for spec in specs])
    presence = spread([spec.presence_penalty for spec in specs])
    frequency = spread([spec.frequency_penalty for spec in specs])
    counts = torch.from_numpy(np.concatenate([counts.counts for _, _, counts in penalised])).to(logits_RV.device)
    places = _places([(row, counts.ids) for row, _, counts in penalised], logits_RV)
    old = logits_RV[places]
    new = torch.where(old > 0, old / repetition, old * repetition)
    logits_RV[places] = new - presence * (counts > 0) - frequency * counts


def _places(parts: Sequence[tuple[int, _Ints] | tuple[int, _Ints, _Floats]], logits_RV: Tensor) -> tuple[Tensor, ...]:
    """An index of the tokens `part[1]` in each row `part[0]`."""
    rows = np.repeat([part[0] for part in parts], [len(part[1]) for part in parts])
    columns = np.concatenate([part[1] for part in parts])
    return tuple(torch.from_numpy(index).to(logits_RV.device) for index in (rows, columns))
