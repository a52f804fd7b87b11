"""A service that is shutting down refuses new requests, even if a prefill gang could answer; running ones finish."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.router.dispatch.dispatch import Dispatcher
from tests.router.fake_fleet import FakeFleet, FakeLink, Fault
from tests.router.serving import model_info


def request_of(name: str) -> GenerateRequest:
    return GenerateRequest(name, [5, 6], SamplingSpec(max_tokens=6))


async def tokens_of(dispatcher: Dispatcher, name: str) -> list[int]:
    return [token async for chunk in dispatcher.generate(request_of(name)) for token in chunk.token_ids]


def test_nothing_new_begins() -> None:
    async def run() -> None:
        prefill = FakeLink(model_info(), gang_id="p", role="prefill")
        fleet = FakeFleet(prefill)
        dispatcher = Dispatcher(fleet)
        assert len(await tokens_of(dispatcher, "before")) == 6, "where nothing is ending, a prefill gang stands in"
        fleet.is_ending = True
        with pytest.raises(NotReady, match="shutting down"):
            await tokens_of(dispatcher, "late")
        with pytest.raises(NotReady, match="shutting down"):
            await dispatcher.prefill(request_of("late"))
        assert [asked.request_id for asked in prefill.requests] == ["before/d1"]
        assert dispatcher.num_running == 0

    asyncio.run(run())


def test_what_runs_moves_to_a_gang_that_is_still_there() -> None:
    async def run() -> None:
        expected = await tokens_of(Dispatcher(FakeFleet(FakeLink(model_info()))), "alone")
        decode = FakeLink(model_info(), gang_id="d", role="decode", faults=[Fault("error", after=3, closes=True)])
        prefill = FakeLink(model_info(), gang_id="p", role="prefill")
        fleet = FakeFleet(decode, prefill)
        dispatcher = Dispatcher(fleet)
        got: list[int] = []
        async with aclosing(dispatcher.generate(request_of("running"))) as chunks:
            async for chunk in chunks:
                fleet.is_ending = True
                got += chunk.token_ids
        assert got == expected
        assert [asked.num_replayed for asked in prefill.requests] == [3]

    asyncio.run(run())
