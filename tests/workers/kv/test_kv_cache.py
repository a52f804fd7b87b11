"""The KV cache manager by hand-worked cases: tables, sharing, copies, retention, events, figures and the audit."""

from __future__ import annotations

import itertools

import pytest

from tensorweave.cluster.block_hash import block_hashes
from tensorweave.cluster.protocol import Retention, RetentionRange, SamplingSpec
from tensorweave.workers.executor.bookkeeping import book_launch, book_result
from tensorweave.workers.kv.manager import BlockCopy, KVCacheManager
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BaseResourceManager, ResourceManager
from tensorweave.workers.step.result import StepResult

_orders = itertools.count()


def _request(
    tokens: list[int], max_tokens: int = 4, *, salt: str | None = None, retention: Retention | None = None
) -> LlmRequest:
    order = next(_orders)
    return LlmRequest(
        f"r{order}", order, list(tokens), len(tokens), SamplingSpec(max_tokens), cache_salt=salt, retention=retention
    )


def _chunk(kv: KVCacheManager, request: LlmRequest, length: int | None = None) -> StepRow:
    start = request.num_computed
    if request.state is RequestState.WAITING:
        start = kv.budget().quote(request, request.max_len - 1).start
    return StepRow.of_context(request, start, request.context_len - start if length is None else length)


def _step(kv: KVCacheManager, chunks: list[StepRow], decoding: list[LlmRequest]) -> list[BlockCopy]:
    """One step as the executor does it; every sampled token is 7."""
    batch = ScheduledBatch(tuple(chunks), tuple(map(StepRow.of_decode, decoding)))
    kv.prepare_resources(batch)
    copies = kv.take_copies()
    assert kv.audit() == []
    book_launch(batch)
    book_result(batch, StepResult([[7]] * len(batch.sampled)))
    kv.update_resources(batch)
    assert kv.audit() == []
    return copies


def _prefill(kv: KVCacheManager, request: LlmRequest) -> list[BlockCopy]:
    return _step(kv, [_chunk(kv, request)], [])


def test_blocks_come_as_tokens_need_them() -> None:
    kv = KVCacheManager(8, 4)
    request = _request([1, 2, 3, 4, 5, 6], max_tokens=8)
    _step(kv, [_chunk(kv, request, 4)], [])
    assert kv.block_ids(request) == [0]
    _step(kv, [_chunk(kv, request)], [])
    assert kv.block_ids(request) == [0, 1]
    _step(kv, [], [request])
    _step(kv, [], [request])
    assert kv.block_ids(request) == [0, 1]
    _step(kv, [], [request])
    assert kv.block_ids(request) == [0, 1, 2]
    assert (kv.used, kv.available, kv.free_blocks) == (3, 5, 5)
    kv.free_resources(request)
    assert (kv.used, kv.available, kv.free_blocks) == (0, 8, 6)
    assert kv.audit() == []


def test_freeing_twice_or_what_never_started_is_nothing() -> None:
    kv = KVCacheManager(8, 4)
    request = _request([1, 2, 3])
    kv.free_resources(request)
    _prefill(kv, request)
    kv.free_resources(request)
    kv.free_resources(request)
    assert kv.available == 8


def test_full_blocks_are_shared_while_in_use() -> None:
    kv = KVCacheManager(8, 2)
    first, second = _request([1, 2, 3, 4, 5]), _request([1, 2, 3, 4, 6])
    _prefill(kv, first)
    _prefill(kv, second)
    assert kv.block_ids(first)[:2] == kv.block_ids(second)[:2]
    assert kv.block_ids(first)[2] != kv.block_ids(second)[2]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 4)
    assert kv.used == 4


def test_the_last_context_token_is_always_computed() -> None:
    kv = KVCacheManager(8, 2, enable_partial_reuse=False)
    first, second = _request([1, 2, 3, 4]), _request([1, 2, 3, 4])
    _prefill(kv, first)
    assert _chunk(kv, second) == StepRow.of_context(second, 2, 2)


def test_generated_tokens_are_reused_too() -> None:
    kv = KVCacheManager(8, 2)
    first = _request([1, 2, 3])
    _prefill(kv, first)
    _step(kv, [], [first])
    kv.free_resources(first)
    turn_two = _request([1, 2, 3, 7, 9, 9])
    assert _chunk(kv, turn_two).start == 4


def test_part_of_a_block_is_copied() -> None:
    kv = KVCacheManager(8, 4)
    first = _request([1, 2, 3, 4, 5, 6, 7, 8, 9])
    _prefill(kv, first)
    second = _request([1, 2, 3, 4, 5, 6, 0, 0])
    copies = _prefill(kv, second)
    source, target = kv.block_ids(first)[1], kv.block_ids(second)[1]
    assert copies == [BlockCopy(source, target, 2)]
    assert source != target
    assert second.num_cached_tokens == 6
    assert kv.take_copies() == []


def test_the_source_of_a_copy_is_kept_while_the_batch_takes_its_blocks() -> None:
    """Two cached blocks, two free ones, three needed: the cheap cached one would go, were it not to be copied from."""
    kv = KVCacheManager(4, 4)
    cheap = _request([1, 2, 3, 4, 5], 1, retention=Retention((RetentionRange(0, None, 0),)))
    plain = _request([8, 8, 8, 8, 9], 1)
    for request in (cheap, plain):
        _prefill(kv, request)
        kv.free_resources(request)
    copying, other = _request([1, 2, 0], 1), _request([5, 5, 5, 5, 5, 5], 1)
    (copy,) = _step(kv, [_chunk(kv, copying), _chunk(kv, other)], [])
    assert copy.num_tokens == 2
    assert copy.source not in kv.block_ids(copying) + kv.block_ids(other)
    assert _chunk(kv, _request([1, 2, 3, 4, 5])).start == 4


def test_a_copy_is_forgone_where_its_source_has_no_room() -> None:
    """The pool just holds the request, so the source must go: reuse less rather than wait for ever."""
    kv = KVCacheManager(2, 4)
    first = _request([1, 2, 3, 4, 5], max_tokens=1)
    _prefill(kv, first)
    kv.free_resources(first)
    second = _request([1, 2, 3, 0, 0, 0], max_tokens=3)
    quote = kv.budget().quote(second, second.max_len - 1)
    assert (quote.start, quote.num_blocks) == (0, 2)
    assert _prefill(kv, second) == []


def test_equal_blocks_computed_at_once_become_one() -> None:
    kv = KVCacheManager(8, 2)
    twins = [_request([1, 2, 3, 4, 5]), _request([1, 2, 3, 4, 5])]
    _step(kv, [StepRow.of_context(request, 0, 5) for request in twins], [])
    assert kv.block_ids(twins[0])[:2] == kv.block_ids(twins[1])[:2]
    assert kv.used == 4


def test_a_block_table_grows_in_place_and_is_another_list_after_an_exchange() -> None:
    kv = KVCacheManager(12, 2)
    first, twin = _request([1, 2, 3]), _request([1, 2, 3])
    _prefill(kv, first)
    table = kv.block_ids(first)
    for length in (2, 3, 3):
        _step(kv, [], [first])
        assert kv.block_ids(first) is table
        assert len(table) == length
    batch = ScheduledBatch((StepRow.of_context(twin, 2, 1),))
    kv.prepare_resources(batch)
    book_launch(batch)
    book_result(batch, StepResult([[7]]))
    kv.update_resources(batch)
    table, before = kv.block_ids(twin), list(kv.block_ids(twin))
    _step(kv, [], [twin])  # fills [3, 7], which `first` has put into the tree
    assert table == before
    assert kv.block_ids(twin) is not table
    assert kv.block_ids(twin) == kv.block_ids(first)[:2] != before


def test_a_block_table_is_another_list_only_where_blocks_were_taken_away() -> None:
    kv = KVCacheManager(12, 2)
    request = _request([1, 2, 3], max_tokens=8)
    _prefill(kv, request)
    batch = ScheduledBatch(generation=(StepRow(request, 3, 4, 4),))
    kv.prepare_resources(batch)
    table = kv.block_ids(request)
    kv.truncate(request, 7)
    assert kv.block_ids(request) is table
    assert len(table) == 4
    kv.truncate(request, 4)
    assert len(table) == 4
    assert kv.block_ids(request) is not table
    assert kv.block_ids(request) == table[:2]
    assert kv.audit() == []


def test_an_idle_node_takes_the_block_that_holds_the_same() -> None:
    """Its own block is free at once, while that of the request may be read by a launched step: were these exchanged,
    one block less would be to be had for a step."""
    kv = KVCacheManager(4, 2)
    _prefill(kv, old := _request([1, 2, 3]))
    kv.free_resources(old)
    request = _request([1, 2, 3])
    context = ScheduledBatch((StepRow.of_context(request, 0, 3),))
    kv.prepare_resources(context)
    book_launch(context)
    decode = ScheduledBatch((), (StepRow.of_decode(request),))
    kv.prepare_resources(decode)
    book_launch(decode)
    table, num_available = kv.block_ids(request), kv.available
    book_result(context, StepResult([[7]]))
    kv.update_resources(context)
    assert kv.block_ids(request) is table
    assert kv.available == num_available == 2
    assert kv.audit() == []
    kv.free_resources(request)
    assert _chunk(kv, _request([1, 2, 3])).start == 2


def test_a_request_copies_from_the_block_that_its_quote_counts_on() -> None:
    """Of two that begin alike, the one that is in use: to hold the idle one would take the last block."""
    kv = KVCacheManager(3, 4)
    _prefill(kv, idle := _request([1, 0, 0, 0, 9], 1))
    kv.free_resources(idle)
    _prefill(kv, used := _request([1, 4, 0, 0, 9], 1))
    assert kv.available == 1
    request = _request([1, 5, 5], 1)
    chunk = _chunk(kv, request)
    assert chunk.start == 1
    (copy,) = _step(kv, [chunk], [])
    assert copy.source == kv.block_ids(used)[0]


def test_what_comes_back_is_what_nobody_else_uses() -> None:
    kv = KVCacheManager(12, 2, enable_partial_reuse=False)
    first, second, third = (_request([1, 2, 3, 4, 5, tail]) for tail in (6, 7, 8))
    _prefill(kv, first)
    assert kv.budget().freed([first]) == [3]
    quote = kv.budget().quote(second, second.max_len - 1)
    assert (quote.start, quote.num_kept) == (4, 2)
    _prefill(kv, second)
    assert kv.budget().freed([first, second]) == [1, 1]
    assert kv.budget().quote(third, third.max_len - 1).num_kept == 0, "two use them: they stay when one ends"
    kv.free_resources(first)
    assert kv.budget().freed([second]) == [3]


def test_a_paused_request_finds_its_blocks_again() -> None:
    kv = KVCacheManager(8, 2)
    request = _request([1, 2, 3, 4, 5])
    _prefill(kv, request)
    before = kv.block_ids(request)[:2]
    kv.free_resources(request)
    request.pause()
    _prefill(kv, request)
    assert kv.block_ids(request)[:2] == before
    assert request.num_cached_tokens == 0, "what was cached for the client is what was found at first"


def test_salts_do_not_share() -> None:
    kv = KVCacheManager(8, 2)
    plain, salted, same = _request([1, 2, 3]), _request([1, 2, 3], salt="x"), _request([1, 2, 3], salt="x")
    for request in (plain, salted, same):
        _prefill(kv, request)
    assert (salted.num_cached_tokens, same.num_cached_tokens) == (0, 2)


def test_without_reuse_nothing_is_kept() -> None:
    kv = KVCacheManager(8, 2, enable_block_reuse=False)
    for _ in range(2):
        request = _request([1, 2, 3, 4, 5])
        _prefill(kv, request)
        assert request.num_cached_tokens == 0
        kv.free_resources(request)
        assert kv.free_blocks == 8


def test_matches_of_the_batch_are_kept_from_its_own_allocations() -> None:
    """`greedy` comes first and needs all that is free; the idle blocks that `thrifty` counts on are the older ones."""
    kv = KVCacheManager(6, 2, enable_partial_reuse=False)
    old, young = _request([1, 2, 3, 4, 5]), _request([6, 6, 7, 7, 8])
    for request in (old, young):
        _prefill(kv, request)
        kv.free_resources(request)
    greedy, thrifty = _request([9, 9, 9, 9, 9, 9], 1), _request([1, 2, 3, 4, 0], 1)
    thrifty_chunk = _chunk(kv, thrifty)
    assert thrifty_chunk.start == 4
    _step(kv, [_chunk(kv, greedy), thrifty_chunk], [])
    assert set(kv.block_ids(greedy)).isdisjoint(kv.block_ids(thrifty))


def test_a_budget_counts_shared_blocks_once_and_changes_nothing() -> None:
    kv = KVCacheManager(10, 2, enable_partial_reuse=False)
    seed = _request([1, 2, 3, 4, 5], max_tokens=1)
    _prefill(kv, seed)
    kv.free_resources(seed)
    first, second = _request([1, 2, 3, 4, 5], 2), _request([1, 2, 3, 4, 6], 2)
    budget = kv.budget()
    quote = budget.quote(first, 6)
    assert (quote.start, quote.num_blocks) == (4, 3)
    budget.take(quote)
    assert budget.quote(second, 6).num_blocks == 1
    assert kv.available == 10
    assert kv.audit() == []


def test_a_budget_gets_shared_blocks_back_with_their_last_user() -> None:
    kv = KVCacheManager(10, 2)
    pair = [_request([1, 2, 3, 4, 5]), _request([1, 2, 3, 4, 6])]
    for request in pair:
        _prefill(kv, request)
    budget = kv.budget()
    assert budget.num_left == 6
    budget.release(pair[0])
    assert budget.num_left == 7
    budget.release(pair[1])
    assert budget.num_left == 10


def test_retention_decides_what_goes_first() -> None:
    kv = KVCacheManager(4, 2, enable_partial_reuse=False)
    system = Retention((RetentionRange(0, 2, 90),), decode_priority=10)
    dear = _request([1, 2, 3, 4, 5], 1, retention=system)
    _prefill(kv, dear)
    kv.free_resources(dear)
    for salt in ("x", "y"):
        other = _request([8, 8, 8, 8, 8], 1, salt=salt)
        _prefill(kv, other)
        kv.free_resources(other)
    assert _chunk(kv, _request([1, 2, 3, 4, 5])).start == 2


def test_a_retention_ends() -> None:
    kv = KVCacheManager(3, 2, enable_partial_reuse=False)
    dear = _request([1, 2, 3], 1, retention=Retention((RetentionRange(0, None, 90, 5.0),)))
    _prefill(kv, dear)
    kv.free_resources(dear)
    plain = _request([4, 4, 4], 1)
    _prefill(kv, plain)
    kv.free_resources(plain)
    kv.now_s = 6.0
    _prefill(kv, last := _request([5, 5, 5], 1))
    kv.free_resources(last)
    assert _chunk(kv, _request([4, 4, 4])).start == 2
    assert _chunk(kv, _request([1, 2, 3])).start == 0


@pytest.mark.parametrize(("index", "expected"), [(0, (90, None)), (4, (50, 9.0)), (6, (35, None)), (8, (10, 3.0))])
def test_a_block_is_worth_what_its_first_token_is(index: int, expected: tuple[int, float | None]) -> None:
    ranges = (RetentionRange(0, 4, 90), RetentionRange(2, 6, 50, 9.0))
    request = _request([0] * 8, retention=Retention(ranges, decode_priority=10, decode_duration_s=3.0))
    assert KVCacheManager(4, 2).retention(request, index) == expected


def test_figures() -> None:
    kv = KVCacheManager(8, 2)
    for tail in (5, 6):
        _prefill(kv, _request([1, 2, 3, 4, tail]))
    assert kv.stats() == {
        "maxNumBlocks": 8,
        "freeNumBlocks": 4,
        "usedNumBlocks": 4,
        "cachedNumBlocks": 0,
        "tokensPerBlock": 2,
        "allocTotalBlocks": 6,
        "allocNewBlocks": 4,
        "reusedBlocks": 2,
        "missedBlocks": 4,
        "cacheHitRate": 2 / 6,
    }


def test_bounds() -> None:
    kv = KVCacheManager(8, 4)
    assert kv.max_request_tokens == 33
    assert kv.get_max_resource_count() == 8
    assert kv.get_needed_resource_to_completion(_request([1] * 5, max_tokens=4)) == 2
    assert kv.get_needed_resource_to_completion(_request([1] * 5, max_tokens=5)) == 3
    with pytest.raises(ValueError, match="holds nothing"):
        KVCacheManager(0, 4)


def test_events_tell_what_is_cached() -> None:
    kv = KVCacheManager(2, 2, event_buffer_max_size=10)
    first = _request([1, 2, 3], 1)
    _prefill(kv, first)
    kv.free_resources(first)
    created, stored = kv.take_events()
    assert created == {"event_id": 0, "data": {"type": "created", "num_blocks_per_cache_level": [2]}}
    (block,) = stored["data"]["blocks"]
    assert (stored["event_id"], stored["data"]["type"]) == (1, "stored")
    assert ([token["token_id"] for token in block["tokens"]], block["priority"]) == ([1, 2], 35)
    _prefill(kv, _request([4, 4, 4], 1))
    assert [event["data"]["type"] for event in kv.take_events()] == ["removed", "stored"]
    assert kv.take_events() == []


def test_what_is_discarded_is_found_no_more_and_harms_nobody_who_shares_it() -> None:
    kv = KVCacheManager(12, 2, event_buffer_max_size=100)
    old, other, bad = _request([1, 2, 3, 4, 5, 6, 7]), _request([1, 2, 9, 9]), _request([1, 2, 3, 4, 8])
    _prefill(kv, old)
    kv.free_resources(old)  # idle below what the bad one uses: it was computed from that
    _prefill(kv, other)
    _prefill(kv, bad)
    shared, own, last = kv.block_ids(bad)
    below = kv.block_ids(old_again := _prefilled(kv, [1, 2, 3, 4, 5, 6, 7]))[2]
    kv.free_resources(old_again)
    kv.take_events()
    lost = kv.discard_resources(bad)
    assert sorted(lost) == sorted([own, last, below])
    assert kv.audit() == []
    removed = [name for event in kv.take_events() for name in event["data"]["block_hashes"]]
    assert removed == [block.hex() for block in block_hashes([1, 2, 3, 4, 5, 6], 2, None)[1:]]
    assert _chunk(kv, _request([1, 2, 3, 4, 5, 6, 7])).start == 2  # `other` uses the first block
    _step(kv, [], [other])
    assert kv.block_ids(other)[0] == shared
    kv.free_resources(other)
    again = _prefilled(kv, [1, 2, 3, 4, 5, 6, 7])
    assert again.num_cached_tokens == 2
    kv.free_resources(again)
    assert _prefilled(kv, [1, 2, 3, 4, 5, 6, 7]).num_cached_tokens == 6
    big = _prefilled(kv, list(range(20, 36)))  # takes every block that nobody uses, forgotten ones too
    assert (kv.available, kv.audit()) == (0, [])
    assert len(kv.block_ids(big)) == 8
    assert kv.discard_resources(_request([1])) == ()


def _prefilled(kv: KVCacheManager, tokens: list[int]) -> LlmRequest:
    request = _request(tokens)
    _prefill(kv, request)
    return request


def test_events_are_bounded_and_off_by_default() -> None:
    kv, quiet = KVCacheManager(8, 1, event_buffer_max_size=2), KVCacheManager(8, 1)
    for manager in (kv, quiet):
        _prefill(manager, _request([1, 2, 3, 4, 5, 6], 1))
    assert [event["event_id"] for event in kv.take_events()] == [5, 6]
    assert quiet.take_events() == []


def test_a_plan_beyond_the_pool_or_the_cache_is_refused() -> None:
    kv = KVCacheManager(2, 2)
    with pytest.raises(ValueError, match="more KV blocks than there are"):
        kv.prepare_resources(ScheduledBatch((StepRow.of_context(_request([1] * 5), 0, 5),)))
    with pytest.raises(ValueError, match="beyond what is cached"):
        kv.prepare_resources(ScheduledBatch((StepRow.of_context(_request([1] * 4), 2, 2),)))


def test_a_request_is_cut_to_what_was_verified() -> None:
    kv = KVCacheManager(8, 2)
    request = _request([1, 2, 3, 4, 5], max_tokens=20)
    _prefill(kv, request)
    kv.prepare_resources(ScheduledBatch((), (StepRow(request, 5, 6, 6),)))
    assert (len(kv.block_ids(request)), kv.available) == (6, 2)
    kv.truncate(request, 6)
    assert (len(kv.block_ids(request)), kv.available) == (3, 5)
    assert kv.audit() == []
    kv.truncate(request, 5)
    assert len(kv.block_ids(request)) == 3
    with pytest.raises(ValueError, match="more are in the tree"):
        kv.truncate(request, 2)
    _step(kv, [], [request])
    kv.free_resources(request)
    assert kv.available == 8


def test_tokens_that_were_not_taken_leave_nothing_in_the_tree() -> None:
    """A row of four samples of which two are right: the block that the others filled is not found by anybody."""
    kv = KVCacheManager(8, 2)
    request = _request([1, 2, 3], max_tokens=20)
    _prefill(kv, request)
    batch = ScheduledBatch((), (StepRow(request, 3, 4, 4),))
    kv.prepare_resources(batch)
    book_launch(batch)
    settled = book_result(batch, StepResult([[8, 9]]))
    assert (settled.truncated, request.tokens, request.num_computed) == ([request], [1, 2, 3, 7, 8, 9], 5)
    kv.update_resources(batch)
    kv.truncate(request, request.num_computed)
    assert kv.audit() == []
    assert len(kv.block_ids(request)) == 3
    assert _chunk(kv, _request([1, 2, 3, 7, 8, 9, 9, 9])).start == 4
    _step(kv, [], [request])
    assert _chunk(kv, _request([1, 2, 3, 7, 8, 9, 9, 9])).start == 6


def test_kv_that_comes_from_elsewhere_is_found_by_others() -> None:
    kv = KVCacheManager(8, 2)
    request = _request([1, 2, 3, 4, 5])
    kv.prepare_resources(ScheduledBatch(fetching=(StepRow(request, 0, 5, 0),)))
    request.resume(5, 7)
    kv.store_computed(request)
    assert kv.audit() == []
    assert _chunk(kv, _request([1, 2, 3, 4, 9])).start == 4


def test_a_block_that_a_launched_step_reads_is_not_given_away() -> None:
    """Twins fill equal blocks. The second's is exchanged for the first's while its next step is launched already."""
    kv = KVCacheManager(8, 4)
    twins = [_request([1, 2, 3, 4, 5], max_tokens=8) for _ in range(2)]
    first = ScheduledBatch(tuple(StepRow.of_context(twin, 0, 5) for twin in twins))
    kv.prepare_resources(first)
    book_launch(first)
    second = ScheduledBatch((), tuple(map(StepRow.of_decode, twins)))
    kv.prepare_resources(second)
    book_launch(second)
    read = kv.block_ids(twins[1])[0]
    assert read != kv.block_ids(twins[0])[0]
    book_result(first, StepResult([[7], [7]]))
    kv.update_resources(first)
    assert kv.block_ids(twins[0])[0] == kv.block_ids(twins[1])[0]
    assert read not in kv._pool.free_ids
    assert kv.audit() == []
    book_result(second, StepResult([[7], [7]]))
    kv.update_resources(second)
    assert read in kv._pool.free_ids
    assert kv.audit() == []


def test_the_source_of_a_copy_is_kept_until_its_own_step_has_settled() -> None:
    kv = KVCacheManager(8, 4)
    _step(kv, [_chunk(kv, done := _request([1, 2, 3, 4, 5, 6], max_tokens=1))], [])
    kv.free_resources(done)
    before = ScheduledBatch((_chunk(kv, running := _request([9] * 5, max_tokens=8)),))
    kv.prepare_resources(before)
    book_launch(before)
    copying = ScheduledBatch((_chunk(kv, _request([1, 2, 3, 9, 9])),))
    kv.prepare_resources(copying)
    book_launch(copying)
    (copy,) = kv.take_copies()
    (source,) = (node for node in kv._tree.nodes() if node.block == copy.source)
    book_result(before, StepResult([[7]]))
    kv.update_resources(before)
    assert source.refs == 1
    book_result(copying, StepResult([[7]]))
    kv.update_resources(copying)
    assert (source.refs, kv.audit()) == (0, [])
    assert running.num_computed == 5


def test_audit_sees_a_lost_and_a_doubly_held_block() -> None:
    kv = KVCacheManager(4, 2)
    request = _request([1, 2, 3])
    _prefill(kv, request)
    block = kv.block_ids(request).pop()
    assert any(f"block {block} is in 0 places" in line for line in kv.audit())
    kv.block_ids(request).append(kv._pool.free_ids[0])
    assert any("is in 2 places" in line for line in kv.audit())


def test_managers_are_called_in_order_and_the_kv_cache_is_last() -> None:
    calls: list[str] = []

    class Slots(BaseResourceManager):
        def prepare_resources(self, batch: ScheduledBatch) -> None:
            calls.append(f"prepare, {kv.used} blocks used")

        def update_resources(self, batch: ScheduledBatch) -> None:
            calls.append("update")

        def free_resources(self, request: LlmRequest) -> None:
            calls.append(f"free, {kv.used} blocks used")

        def shutdown(self) -> None:
            calls.append("shutdown")

    kv = KVCacheManager(4, 2)
    resources = ResourceManager([Slots(), kv])
    assert resources.kv_cache is kv
    request = _request([1, 2, 3])
    batch = ScheduledBatch((StepRow.of_context(request, 0, 3),))
    resources.prepare_resources(batch)
    resources.update_resources(batch)
    resources.free_resources(request)
    resources.shutdown()
    assert calls == ["prepare, 0 blocks used", "update", "free, 2 blocks used", "shutdown"]
    for managers in ([], [kv, Slots()]):
        with pytest.raises(ValueError, match="must be a KV cache manager"):
            ResourceManager(managers)
