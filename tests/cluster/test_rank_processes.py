"""Ranks whose processes Ray has not started yet: who is waited for, and what ends the wait."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.rank_processes import RankProcesses
from tensorweave.cluster.ranks import RankPlace, RankStarted, describe_durations, describe_phases

NODES = [("a", "10.0.0.1"), ("b", "10.0.0.2")]
_PATIENCE_S = 60.0


def place(node_id: str) -> RankPlace:
    return RankPlace(node_id=node_id, pid=1, created_s=0.0, oom_kills=0)


async def answered(node_id: str) -> RankPlace:
    return place(node_id)


async def never() -> RankPlace:
    await asyncio.Event().wait()
    raise AssertionError


def test_all_ranks_answer() -> None:
    ranks = RankProcesses(NODES, lambda: {"a", "b"})
    places = asyncio.run(ranks.until_up([answered("a"), answered("b")]))
    assert places == [place("a"), place("b")]


def test_phases_are_described_and_a_lost_node_ends_the_start() -> None:
    seen: list[str] = []

    def live_nodes() -> Collection[str]:
        seen.append(describe_phases(ranks.phases()))
        return {"a", "b"} if len(seen) == 1 else {"a"}

    async def body() -> None:
        async with asyncio.timeout(_PATIENCE_S):
            await ranks.until_up([answered("a"), never()], check_interval_s=0.001)

    ranks = RankProcesses(NODES, live_nodes)
    with pytest.raises(
        WorkerLost, match=r"Ray has lost the host of rank 1 on 10\.0\.0\.2 before the process had start"
    ):
        asyncio.run(body())
    waiting = "rank 0 (10.0.0.1): waiting for the others; rank 1 (10.0.0.2): its process is being started by Ray"
    assert seen == [waiting, waiting]


def test_a_start_is_described_by_its_slowest_rank() -> None:
    fast = RankStarted(None, {}, None, durations={"importing": 1.0, "loading the weights": 2.0})
    slow = RankStarted(None, {}, None, durations={"importing": 1.04, "loading the weights": 3.26})
    assert describe_durations([fast, slow]) == "importing 1.0 s, loading the weights 3.3 s"
    assert describe_durations([RankStarted(None, {}, None)]) == ""
