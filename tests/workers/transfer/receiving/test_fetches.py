"""Which heads a receiving rank reads from which sending rank."""

from __future__ import annotations

from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.receiving.fetches import share_heads


def endpoints_of(*heads: tuple[int, int]) -> tuple[KvEndpoint, ...]:
    return tuple(KvEndpoint("h", port, first, num) for port, (first, num) in enumerate(heads))


def shares(endpoints: tuple[KvEndpoint, ...], heads: range, rank: int) -> list[tuple[int, int, int]]:
    found = share_heads(endpoints, heads, rank)
    assert not isinstance(found, str)
    return [(endpoint.port, heads.start, heads.stop) for endpoint, heads in found]


def test_each_rank_reads_from_those_that_hold_its_heads() -> None:
    assert shares(endpoints_of((0, 8)), range(8), 0) == [(0, 0, 8)]
    assert shares(endpoints_of((0, 3), (3, 3), (6, 2)), range(2, 7), 1) == [(0, 2, 3), (1, 3, 6), (2, 6, 7)]
    assert shares(endpoints_of((0, 1), (0, 1), (1, 1)), range(1), 1) == [(1, 0, 1)]
    assert shares(endpoints_of((0, 1), (0, 1), (1, 1)), range(1, 2), 2) == [(2, 1, 2)]


def test_rank_0_always_reads_from_rank_0() -> None:
    assert shares(endpoints_of((1, 1), (0, 1)), range(1), 0) == [(0, 0, 0), (1, 0, 1)]


def test_a_head_that_no_rank_holds_is_named() -> None:
    assert share_heads(endpoints_of((0, 2)), range(1, 4), 0) == "heads: no sending rank holds KV head 2"
    assert share_heads((), range(1), 0) == "heads: no sending rank holds KV head 0"
