"""Splits cover everything once and evenly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tensorweave.workers.models.shards import shard_heads, split_evenly


@given(st.integers(0, 500), st.integers(1, 40))
def test_even_splits_cover_all_and_differ_by_one(total: int, parts: int) -> None:
    ranges = split_evenly(total, parts)
    assert [i for part in ranges for i in part] == list(range(total))
    assert len(ranges) == parts
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_every_query_head_reads_its_own_kv_head(num_kv_heads: int, group: int, data: st.DataObject) -> None:
    num_heads = num_kv_heads * group
    size = data.draw(st.integers(1, num_heads))
    shards = shard_heads(num_heads, num_kv_heads, size)
    assert [head for shard in shards for head in shard.query] == list(range(num_heads))
    for shard in shards:
        assert len(shard.read_heads) * shard.group_size == len(shard.query) > 0
        assert [shard.kv[shard.read_heads[i // shard.group_size]] for i in range(len(shard.query))] == [
            head // group for head in shard.query
        ]
    if size <= num_kv_heads:
        assert sum(len(shard.kv) for shard in shards) == num_kv_heads


def test_smollm2_at_two_splits_on_groups() -> None:
    first, second = shard_heads(9, 3, 2)
    assert (first.query, first.kv, first.group_size) == (range(6), range(2), 3)
    assert (second.query, second.kv, second.group_size) == (range(6, 9), range(2, 3), 3)
