"""Logits processors that a pool's gangs hold, with gangs that are lost, refuse, or start meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.pool_logits_processors import PoolLogitsProcessors


class FakeGang:
    gang_id = "fake"

    def __init__(self, error: Exception | None = None) -> None:
        self.held: dict[str, Any] = {}
        self._error = error

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error
        self.held |= processors


def test_present_and_future_gangs_have_the_same_processors() -> None:
    async def run() -> None:
        held, first, late = PoolLogitsProcessors(), FakeGang(), FakeGang()
        await held.update([first, FakeGang(WorkerLost("gone"))], {"a": 1, "b": 2})
        await held.update([first], {"a": None})
        starting = asyncio.create_task(held.install(late))
        await asyncio.sleep(0)
        await held.update([first], {"c": 3})
        await starting
        assert first.held == {"a": None, "b": 2, "c": 3}
        assert late.held == {"b": 2, "c": 3}
        await held.install(FakeGang(ValueError("cannot be loaded here")))

    asyncio.run(run())


def test_a_processor_that_a_rank_cannot_load_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        asyncio.run(PoolLogitsProcessors().update([FakeGang(ValueError("cannot be loaded"))], {"a": 1}))
