"""`PublicPatterns`: what followed n-grams in a gang's requests, past ones among them, for drafts of other requests.

Requests with a cache salt neither give to it nor take from it, and those of one adapter give to each other alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, TypeAlias

from tensorweave.workers.speculation.drafter import NOTHING, Draft
from tensorweave.workers.step.request import LlmRequest

MOST_PATTERNS: Final = 1 << 16
"""About 30 MB at 16 drafted tokens."""


NGram: TypeAlias = tuple[bytes | int | None, ...]
"""The digest of the requests' adapter, if they have one, and the tokens."""


class PublicPatterns:
    """N-grams of `size` tokens, each with the up to `length` tokens that followed it: first of all, or with
    `keeps_newest` last. Beyond `most` patterns the one that was noted first is forgotten."""

    def __init__(self, size: int, length: int, *, keeps_newest: bool = False, most: int = MOST_PATTERNS) -> None:
        self._size = size
        self._length = length
        self._keeps_newest = keeps_newest
        self._most = most
        self._followers: OrderedDict[NGram, tuple[int, ...]] = OrderedDict()
        self._num_taken: dict[LlmRequest, int] = {}

    def __len__(self) -> int:
        return len(self._followers)

    def take_in(self, request: LlmRequest, num_tokens: int) -> None:
        """Note the n-grams of the request's first `num_tokens` tokens that have all their followers."""
        if request.is_salted:
            return
        first = self._num_taken.get(request, self._size)
        stop = max(first, num_tokens - self._length + 1)
        for at in range(first, stop):
            ngram = (request.adapter_digest, *request.tokens[at - self._size : at])
            self._note(ngram, tuple(request.tokens[at : at + self._length]))
        self._num_taken[request] = stop

    def draft(self, request: LlmRequest, limit: int) -> Draft:
        """What followed the request's newest tokens elsewhere. The kind is that of none of its own n-grams."""
        if request.is_salted:
            return NOTHING
        followers = self._followers.get((request.adapter_digest, *request.tokens[-self._size :]), ())
        return Draft(followers[:limit], -1)

    def forget(self, request: LlmRequest) -> None:
        self._num_taken.pop(request, None)

    def _note(self, ngram: NGram, followers: tuple[int, ...]) -> None:
        if self._keeps_newest:
            self._followers.pop(ngram, None)
        self._followers.setdefault(ngram, followers)
        if len(self._followers) > self._most:
            self._followers.popitem(last=False)
