"""Statistics and KV events over a leader's socket: more rows than a frame holds, and a bounded memory for events."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.cluster import wire
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.workers.fakes.fake_executor import FakeExecutor
from tests.workers.leader.test_leader_told import WAIT_S, serve

pytestmark = pytest.mark.usefixtures("patient_links")


async def all_events(link: SocketLink, newest_id: int) -> list[dict[str, Any]]:
    """Until that one has come: the leader hears of events a moment after they were put."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["event_id"] < newest_id:
        events += await link.kv_events(WAIT_S)
    return events


def stored(number: int) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": "00", "blocks": [{"block_hash": f"{number:08x}"}]}


def test_events_are_told_once_to_whoever_asks() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(*map(stored, range(3)))
        events = await all_events(one, 2)
        assert [event["event_id"] for event in events] == [0, 1, 2]
        assert events[1]["data"] == stored(1)
        assert await two.kv_events(WAIT_S) == []

    executor = FakeExecutor()
    serve(executor, body, max_kv_events=10)


def test_more_events_than_a_frame_holds() -> None:
    num_events = 3 * wire.MAX_ROWS

    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(*map(stored, range(num_events)))
        assert [event["event_id"] for event in await all_events(one, num_events - 1)] == list(range(num_events))

    executor = FakeExecutor()
    serve(executor, body, max_kv_events=num_events)


def test_the_oldest_events_go_first() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(*map(stored, range(9)))
        assert [event["event_id"] for event in await all_events(one, 8)] == [5, 6, 7, 8]

    executor = FakeExecutor()
    serve(executor, body, max_kv_events=4)


def test_none_are_kept_unless_asked_for() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(stored(1))
        assert await one.kv_events(WAIT_S) == []

    executor = FakeExecutor()
    serve(executor, body)


def test_more_statistics_than_a_frame_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"iter": number} for number in range(2 * wire.MAX_ROWS + 5)]

    async def body(one: SocketLink, two: SocketLink) -> None:
        assert await one.stats(WAIT_S) == rows
        assert await two.stats(WAIT_S) == []

    left = [rows]
    executor = FakeExecutor()
    monkeypatch.setattr(executor, "get_latest_iteration_stats", lambda: left.pop() if left else [])
    serve(executor, body)
