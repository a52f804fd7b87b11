"""The store by which the ranks of a gang exchange addresses."""

from __future__ import annotations

import asyncio

import pytest

from tensorweave.workers.gang.rendezvous import RendezvousStore
from tests.workers.waiting import WAIT_S


def test_a_rendezvous_store_keeps_and_counts() -> None:
    async def run() -> None:
        store = RendezvousStore()
        waiting = asyncio.create_task(store.call("get", "late", WAIT_S))
        await store.call("set", "early", b"1")
        await store.call("set", "late", b"2")
        assert await waiting == b"2"
        await store.call("wait", ["early", "late"], WAIT_S)
        assert [await store.call("add", "count", amount) for amount in (2, 3)] == [2, 5]
        assert await store.call("has", ["early", "count"])
        assert not await store.call("has", ["early", "never"])
        assert await store.call("delete", "early")
        assert not await store.call("delete", "early")
        with pytest.raises(TimeoutError, match=r"no rank has told early, never within 0\.01 s"):
            await store.call("wait", ["early", "never", "late"], 0.01)

    asyncio.run(run())
