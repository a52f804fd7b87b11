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


MOST_PLACES: Final = 1 << 18
"""n-grams of one request, which take about 60 MB at 16 tokens and 30 MB at 2. Beyond them nothing more is indexed: of
n-grams of up to 2 tokens that is behind 131,072 tokens, of up to 16 behind 16,384."""


class NGramIndex:
    """The places after the n-grams of up to `size` tokens: the first of each, or with `keeps_newest` the last."""

    def __init__(self, size: int, *, keeps_newest: bool) -> None:
        self.num_indexed = 0
        self._size = size
        self._keeps_newest = keeps_newest
        self._places: dict[tuple[int, ...], int] = {}

    def take_in(self, tokens: Sequence[int], limit: int) -> None:
        """Index the n-grams that end before up to `limit` tokens which are new."""
        size, places, note = self._size, self._places, self._places.setdefault
        stop = min(len(tokens), self.num_indexed + limit)
        for at in range(self.num_indexed, stop):
            if len(places) >= MOST_PLACES:
                break
            for first in range(at - size if at > size else 0, at):
                if self._keeps_newest:
                    places[tuple(tokens[first:at])] = at
                else:
                    note(tuple(tokens[first:at]), at)
        self.num_indexed = stop

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The place after the longest n-gram that also ends `tokens`, and its size; size 0 where there is none. Where
        an n-gram stood, its end stood too, so that the search ends at the first one which did not."""
        place, places = (0, 0), self._places
        for size in range(1, min(self._size, len(tokens)) + 1):
            at = places.get(tuple(tokens[-size:]))
            if at is None:
                break
            place = at, size
        return place


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

    def close(self) -> None:
        """Nothing is held."""

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
