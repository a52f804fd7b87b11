"""`NGramDrafter`: drafts what followed the newest tokens where they stood before.

An index holds, for each n-gram of a request's tokens, the place after it. It grows with the request, in constant time
per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tensorweave.workers.speculation.drafter import NOTHING, Draft
from tensorweave.workers.speculation.public_patterns import PublicPatterns
from tensorweave.workers.step.request import LlmRequest

MOST_INDEXED_AT_ONCE: Final = 1024
"""Tokens of a request that are indexed before one step, which takes 0.6 ms at two sizes of n-grams. Of a longer prompt
the rest follows in the next steps."""


class NGramIndex:
    """The places after the n-grams of up to `size` tokens: the first of each, or with `keeps_newest` the last."""

    def __init__(self, size: int, *, keeps_newest: bool) -> None:
        self.num_indexed = 0
        self._keeps_newest = keeps_newest
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(size)]

    def take_in(self, tokens: Sequence[int], limit: int) -> None:
        """Index the n-grams that end before up to `limit` tokens which are new."""
        stop = min(len(tokens), self.num_indexed + limit)
        for size, places in enumerate(self._places, 1):
            for at in range(max(self.num_indexed, size), stop):
                ngram = tuple(tokens[at - size : at])
                if self._keeps_newest:
                    places[ngram] = at
                else:
                    places.setdefault(ngram, at)
        self.num_indexed = stop

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The place after the longest n-gram that also ends `tokens`, and its size; size 0 where there is none."""
        for size in range(min(len(self._places), len(tokens)), 0, -1):
            at = self._places[size - 1].get(tuple(tokens[-size:]))
            if at is not None:
                return at, size
        return 0, 0


class NGramDrafter:
    """A draft's kind is the size of its n-gram.

    Args:
        size: most tokens of an n-gram.
        keeps_newest: continue from the newest place of an n-gram, not from the first.
        public: what followed in other requests; None: nothing of them is drafted.
    """

    def __init__(self, size: int, *, keeps_newest: bool = False, public: PublicPatterns | None = None) -> None:
        self._size = size
        self._keeps_newest = keeps_newest
        self._public = public
        self._by_request: dict[LlmRequest, NGramIndex] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def draft(self, wanted: Sequence[tuple[LlmRequest, int]]) -> Sequence[Draft]:
        return [self._draft(request, limit) for request, limit in wanted]

    def forget(self, request: LlmRequest) -> None:
        self._by_request.pop(request, None)
        if self._public is not None:
            self._public.forget(request)

    def _draft(self, request: LlmRequest, limit: int) -> Draft:
        index = self._by_request.get(request)
        if index is None:
            index = self._by_request[request] = NGramIndex(self._size, keeps_newest=self._keeps_newest)
        index.take_in(request.tokens, MOST_INDEXED_AT_ONCE)
        if self._public is not None:
            self._public.take_in(request, index.num_indexed)
        if limit < 1:
            return NOTHING
        at, size = index.find(request.tokens)
        if size:
            return Draft(_follow(request.tokens, at, limit), size)
        return self._public.draft(request, limit) if self._public is not None else NOTHING


def _follow(tokens: Sequence[int], at: int, limit: int) -> list[int]:
    """What stands from place `at` on. Beyond the end it goes on as the draft does, which repeats what repeats."""
    draft = list(tokens[at : at + limit])
    period = len(tokens) - at
    while len(draft) < limit:
        draft.append(draft[-period])
    return draft
