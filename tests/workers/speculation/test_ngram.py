"""What n-grams draft: what followed them before, found in constant time per token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.speculation import ngram
from tensorweave.workers.speculation.ngram import MOST_INDEXED_AT_ONCE, NGramDrafter, NGramIndex
from tensorweave.workers.speculation.public_patterns import PublicPatterns
from tensorweave.workers.step.request import LlmRequest

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def request(tokens: Sequence[int], order: int = 1, salt: str | None = None) -> LlmRequest:
    return LlmRequest(f"r{order}", order, list(tokens), len(tokens), SamplingSpec(64), cache_salt=salt)


def searched(tokens: Sequence[int], size: int, *, keeps_newest: bool) -> tuple[int, int]:
    """The same by looking at every place."""
    for n in range(min(size, len(tokens)), 0, -1):
        places = [at for at in range(n, len(tokens)) if tokens[at - n : at] == tokens[-n:]]
        if places:
            return (places[-1] if keeps_newest else places[0]), n
    return 0, 0


@given(TOKENS, st.integers(1, 4), st.booleans())
def test_the_longest_ngram_that_stood_before_is_found(tokens: list[int], size: int, keeps_newest: bool) -> None:
    """At every length, while the tokens come one by one."""
    index = NGramIndex(size, keeps_newest=keeps_newest)
    for length in range(1, len(tokens) + 1):
        so_far = tokens[:length]
        index.take_in(so_far, MOST_INDEXED_AT_ONCE)
        assert index.find(so_far) == searched(so_far, size, keeps_newest=keeps_newest)


def test_an_index_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "MOST_PLACES", 6)
    index = NGramIndex(2, keeps_newest=False)
    tokens = [*range(1000), 1, 2]
    index.take_in(tokens, 10_000)
    assert index.num_indexed == len(tokens)
    assert len(index._places) < 8
    assert index.find(tokens) == (3, 2)
    assert index.find([*tokens, 900]) == (0, 0)


def test_a_draft_is_what_followed() -> None:
    [draft] = NGramDrafter(2).draft([(request([1, 2, 3, 4, 5, 6, 1, 2]), 3)])
    assert (draft.tokens, draft.kind) == ([3, 4, 5], 2)


def test_the_oldest_place_or_the_newest() -> None:
    tokens = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2]
    assert NGramDrafter(2).draft([(request(tokens), 2)])[0].tokens == [3, 9]
    assert NGramDrafter(2, keeps_newest=True).draft([(request(tokens), 2)])[0].tokens == [4, 8]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True), st.integers(1, 30))
def test_what_repeats_goes_on_repeating(period: list[int], limit: int) -> None:
    tokens = period * 3
    [draft] = NGramDrafter(3, keeps_newest=True).draft([(request(tokens), limit)])
    assert draft.tokens == (period * (limit + 1))[:limit]


def test_nothing_is_drafted_where_nothing_stood_before_or_there_is_no_room() -> None:
    drafts = NGramDrafter(2).draft([(request([1, 2, 3]), 5), (request([1, 1, 1], 2), 0)])
    assert [draft.tokens for draft in drafts] == [(), ()]


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    """So that no step of the others waits for it."""
    drafter, long = NGramDrafter(1), request([*range(3 * MOST_INDEXED_AT_ONCE), 7, 2 * MOST_INDEXED_AT_ONCE])
    assert drafter.draft([(long, 2)])[0].tokens == ()
    assert drafter.draft([(long, 2)])[0].tokens == ()
    assert drafter.draft([(long, 2)])[0].tokens == [2 * MOST_INDEXED_AT_ONCE + 1, 2 * MOST_INDEXED_AT_ONCE + 2]


def test_a_request_that_is_gone_is_forgotten() -> None:
    public = PublicPatterns(1, 1)
    drafter, gone = NGramDrafter(1, public=public), request([1, 2, 1])
    drafter.draft([(gone, 1)])
    drafter.forget(gone)
    assert not len(drafter)
    assert not public._num_taken


# ---- the pool of all requests


def drafts_of(public: PublicPatterns, tokens: Sequence[int], salt: str | None = None) -> list[int]:
    [draft] = NGramDrafter(2, public=public).draft([(request(tokens, 9, salt), 2)])
    return list(draft.tokens)


def test_by_default_no_request_drafts_what_another_wrote() -> None:
    drafter = NGramDrafter(2)
    drafter.draft([(request([5, 6, 7, 8]), 2)])
    assert drafter.draft([(request([5, 6], 2), 2)])[0].tokens == ()


def test_the_public_pool_drafts_what_followed_elsewhere_and_salts_keep_out() -> None:
    public = PublicPatterns(2, 2)
    public.take_in(request([5, 6, 7, 8, 9]), 5)
    assert drafts_of(public, [1, 5, 6]) == [7, 8]
    assert drafts_of(public, [1, 5, 6], salt="mine") == []
    public.take_in(request([3, 4, 1, 2], 2, salt="mine"), 4)
    assert drafts_of(public, [3, 4]) == []


def test_an_own_ngram_comes_before_the_pools() -> None:
    public = PublicPatterns(2, 2)
    public.take_in(request([5, 6, 7, 8]), 4)
    assert drafts_of(public, [5, 6, 1, 2, 5, 6]) == [1, 2]


@pytest.mark.parametrize("keeps_newest", [False, True])
def test_the_pool_is_bounded(keeps_newest: bool) -> None:
    public = PublicPatterns(1, 1, keeps_newest=keeps_newest, most=100)
    for order in range(50):
        public.take_in(request(range(order * 10, order * 10 + 12), order), 12)
        assert len(public) <= 100
    assert drafts_of_one(public, 495) == [496]
    assert drafts_of_one(public, 5) == []


def drafts_of_one(public: PublicPatterns, token: int) -> list[int]:
    return list(public.draft(request([token], 99), 1).tokens)
