"""How sizes and attention heads are divided among tensor-parallel ranks: contiguous and as even as possible.

Attention splits on KV groups while there are enough of them; past that, query heads are split and a KV head lives on
every rank that has a query head of its group.
"""

from __future__ import annotations

from dataclasses import dataclass


def split_evenly(total: int, parts: int) -> tuple[range, ...]:
    """Contiguous ranges over [0, total), of which the first `total % parts` are one longer."""
    small, extra = divmod(total, parts)
    ends = [(i + 1) * small + min(i + 1, extra) for i in range(parts)]
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The heads of one rank. `read_heads[i]` is the local KV head that the i-th run of `group_size` query heads reads.

    9 query heads over 3 KV heads at tensor parallel 4, where the split cuts through groups:

        rank   query heads   KV heads   read_heads   group_size
        0      0 1 2         0          0            3
        1      3 4           1          0            2
        2      5 6           1 2        0 1          1
        3      7 8           2          0            2
    """

    query: range
    kv: range
    read_heads: tuple[int, ...]
    group_size: int


def shard_heads(num_heads: int, num_kv_heads: int, size: int) -> tuple[HeadShard, ...]:
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        queries = [range(kv.start * group, kv.stop * group) for kv in split_evenly(num_kv_heads, size)]
    else:
        queries = list(split_evenly(num_heads, size))
    return tuple(_head_shard(query, group) for query in queries)


def _head_shard(query: range, group: int) -> HeadShard:
    kv = range(query.start // group, (query.stop - 1) // group + 1)
    kv_of_query = [head // group - kv.start for head in query]
    counts = {kv_of_query.count(i) for i in range(len(kv))}
    if len(counts) == 1:
        return HeadShard(query, kv, tuple(range(len(kv))), counts.pop())
    return HeadShard(query, kv, tuple(kv_of_query), 1)
