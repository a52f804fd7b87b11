"""Silent gangs get no new requests while there are others; lost gangs disappear from the metrics."""

from __future__ import annotations

import asyncio

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeFleet, FakeLink
from tests.router.serving import model_info

PROMPT = [5 + n % 90 for n in range(300)]


async def ask(dispatcher: Dispatcher, name: str) -> list[TokenChunk]:
    request = GenerateRequest(name, PROMPT, SamplingSpec(max_tokens=3))
    return [chunk async for chunk in dispatcher.generate(request)]


def make(*links: FakeLink) -> Dispatcher:
    return Dispatcher(FakeFleet(*links), limits=Limits(ready_timeout_s=0.05))


def test_a_silent_gang_gets_nothing_new_until_it_speaks_again() -> None:
    async def run() -> None:
        quiet, awake = FakeLink(model_info(), gang_id="quiet"), FakeLink(model_info(), gang_id="awake")
        dispatcher = make(quiet, awake)
        quiet.is_quiet = True
        for n in range(4):
            assert (await ask(dispatcher, f"r{n}"))[-1].finish_reason == "length"
        assert (len(quiet.requests), len(awake.requests)) == (0, 4)
        quiet.is_quiet = False
        for n in range(4, 8):
            await ask(dispatcher, f"r{n}")
        assert quiet.requests

    run_stepped(run())


def test_where_all_are_silent_one_of_them_is_asked() -> None:
    link = FakeLink(model_info())
    link.is_quiet = True
    assert run_stepped(ask(make(link), "r"))[-1].finish_reason == "length"


def test_a_silent_prefill_gang_is_done_without() -> None:
    prefill = FakeLink(model_info(), gang_id="p", role="prefill")
    decode = FakeLink(model_info(), gang_id="d", role="decode")
    prefill.is_quiet = True
    assert run_stepped(ask(make(prefill, decode), "r"))[-1].finish_reason == "length"
    assert not prefill.requests


def test_a_gang_that_is_gone_leaves_the_metrics() -> None:
    async def run() -> None:
        fleet = FakeFleet(FakeLink(model_info(), gang_id="old"), FakeLink(model_info(), gang_id="stays"))
        metrics = RouterMetrics("m", Dispatcher(fleet))
        before = (await metrics.render(fleet)).decode()
        assert 'gang="old"' in before
        fleet.all_links[0] = FakeLink(model_info(), gang_id="new")
        after = (await metrics.render(fleet)).decode()
        assert 'gang="old"' not in after
        for name in ("stays", "new"):
            assert f'tensorweave_kv_cache_usage_perc{{gang="{name}",model_name="m"}} 0.25' in after

    asyncio.run(run())  # metrics are rendered on a thread
