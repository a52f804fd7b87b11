"""`ClientTable`: cancels, KV events, statistics and large frames over a leader's socket."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest

from tensorweave.cluster import wire
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.workers.fakes.fake_executor import FakeExecutor, fake_output
from tests.workers.leader.links import (
    PROMPT,
    collect,
    joined_tokens,
    linked,
    make_request,
    run,
    run_with_two_links,
    serving,
    until,
)
from tests.workers.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("patient_links")


def test_a_cancel_after_the_end_reaches_the_executor() -> None:
    """A request that ended on offer has a lease, which only the executor knows."""

    async def body() -> None:
        async with linked(address) as link:
            chunks = [chunk async for chunk in link.generate(replace(make_request("p", 9), offer="ticket"))]
            assert [chunk.finish_reason for chunk in chunks] == ["not_finished"]
            link.cancel("p")
            await until(lambda: executor.given_up == ["p"])

    executor = FakeExecutor()
    with serving(executor) as (_, address):
        run(body)


def stored_events(parent: bytes, *names: bytes) -> list[dict[str, Any]]:
    """The KV manager's events: one per block."""
    chain = [parent, *names]
    return [
        {"type": "stored", "parent_hash": above.hex(), "blocks": [{"block_hash": name.hex()}]}
        for above, name in itertools.pairwise(chain)
    ]


def test_links_follow_the_kv_cache_whenever_they_subscribe() -> None:
    async def body() -> None:
        executor.put_events({"type": "created"}, *stored_events(b"root", b"a", b"b"))
        async with linked(address) as early:
            await until(lambda: len(early.kv) == 2)
            executor.put_events(*stored_events(b"b", b"c"), {"type": "removed", "block_hashes": [b"a".hex()]})
            await until(lambda: early.kv.cached_tokens([b"b", b"c"]) == 64)
            async with linked(address) as late:
                await until(lambda: late.kv.is_synced)
                assert len(late.kv) == len(early.kv) == 2
                assert early.kv.num_resyncs == 0
                # An event is lost before it reaches the leader: only later blocks are known.
                executor.put_events(*stored_events(b"c", b"d"), num_lost=1)
                for link in (early, late):
                    await until(lambda link=link: link.kv.cached_tokens([b"d"]) == 32)
                    assert len(link.kv) == 1

    executor = FakeExecutor()
    with serving(executor) as (_, address):
        run(body)


def test_requested_logits_may_stay_unread_and_exceed_a_frame() -> None:
    """24 chunks of 4 MiB in one step: more than a frame may hold, and far more than an idle client may leave unread."""
    pieces = [bytes([i]) * (4 << 20) for i in range(24)]
    assert sum(map(len, pieces)) > wire.MAX_FRAME_BYTES

    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.hold()
        received = asyncio.create_task(collect(one, GenerateRequest("r", PROMPT, SamplingSpec(2))))
        while not executor.num_requests:
            await asyncio.sleep(0.005)
        executor.say(*(TokenChunk("r", context_logits=piece) for piece in pieces))
        executor.hold(False)
        chunks = await received
        assert [chunk.context_logits for chunk in chunks if chunk.context_logits] == pieces
        assert joined_tokens(chunks) == fake_output(PROMPT, 2)

    executor = FakeExecutor()
    run_with_two_links(executor, body, max_unsent_bytes=64 << 10)


async def all_events(link: SocketLink, newest_id: int) -> list[dict[str, Any]]:
    """All events up to this one, which may reach the leader a little later."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["event_id"] < newest_id:
        events += await link.kv_events(WAIT_S)
    return events


def stored(number: int) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": "00", "blocks": [{"block_hash": f"{number:08x}"}]}


def test_events_are_sent_once() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(*map(stored, range(3)))
        events = await all_events(one, 2)
        assert [event["event_id"] for event in events] == [0, 1, 2]
        assert events[1]["data"] == stored(1)
        assert await two.kv_events(WAIT_S) == []

    executor = FakeExecutor()
    run_with_two_links(executor, body, max_kv_events=10)


def test_more_events_than_a_frame_holds() -> None:
    num_events = 3 * wire.MAX_RECORDS

    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(*map(stored, range(num_events)))
        assert [event["event_id"] for event in await all_events(one, num_events - 1)] == list(range(num_events))

    executor = FakeExecutor()
    run_with_two_links(executor, body, max_kv_events=num_events)


def test_the_oldest_events_are_dropped_first() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(*map(stored, range(9)))
        assert [event["event_id"] for event in await all_events(one, 8)] == [5, 6, 7, 8]

    executor = FakeExecutor()
    run_with_two_links(executor, body, max_kv_events=4)


def test_no_events_are_kept_by_default() -> None:
    async def body(one: SocketLink, two: SocketLink) -> None:
        executor.put_events(stored(1))
        assert await one.kv_events(WAIT_S) == []

    executor = FakeExecutor()
    run_with_two_links(executor, body)


def test_more_statistics_than_a_frame_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"iter": number} for number in range(2 * wire.MAX_RECORDS + 5)]

    async def body(one: SocketLink, two: SocketLink) -> None:
        assert await one.stats(WAIT_S) == records
        assert await two.stats(WAIT_S) == []

    left = [records]
    executor = FakeExecutor()
    monkeypatch.setattr(executor, "get_latest_iteration_stats", lambda: left.pop() if left else [])
    run_with_two_links(executor, body)
