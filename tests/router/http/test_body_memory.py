"""All bodies together have a limit, and each one's memory is released, however its request ends."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tensorweave.cluster.errors import Overloaded
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.app import build_app
from tensorweave.router.http.body_memory import BodyMemory
from tests.router.calls import CHAT, COMPLETIONS, check_error
from tests.router.fake_fleet import FakeLink
from tests.router.serving import chat, client_of, completion, make_service, model_info

LIMITS = Limits(max_body_bytes=3000, max_held_body_bytes=4000)


def test_shares() -> None:
    memory = BodyMemory(10)
    with memory.share() as first, memory.share() as second:
        first.take(4)
        first.take(2)
        second.take(4)
        with pytest.raises(Overloaded):
            second.take(1)
        first.release()
        second.take(1)
        assert memory.num_bytes == 5
    assert memory.num_bytes == 0


def test_no_body_larger_than_all_together() -> None:
    with pytest.raises(ValueError, match="max_held_body_bytes is 10, less than max_body_bytes, 20"):
        Limits(max_body_bytes=20, max_held_body_bytes=10)


def test_a_body_beyond_what_all_may_hold_is_told_to_come_back() -> None:
    """One body has been sent up to its last byte; the next one finds no room until the first has been answered."""

    async def body() -> None:
        service = make_service(FakeLink(model_info(4096)), limits=LIMITS)
        may_end, has_come = asyncio.Event(), asyncio.Event()
        held = httpx.Request("POST", "http://router", json=chat("x" * 2000, max_tokens=1)).read()

        async def slowly():  # type: ignore[no-untyped-def]
            yield held[:-1]
            has_come.set()
            await may_end.wait()
            yield held[-1:]

        async with client_of(build_app(service)) as client:
            headers = {"content-type": "application/json"}
            first = asyncio.create_task(client.post(CHAT, content=slowly(), headers=headers))
            await has_come.wait()
            for path, fields in ((COMPLETIONS, completion("x" * 2000)), ("/tokenize", {"prompt": "x" * 2000})):
                check_error(await client.post(path, json=fields), 429, None, "overloaded")
            may_end.set()
            assert (await first).status_code == 200
            assert (await client.post(COMPLETIONS, json=completion("x" * 2000, max_tokens=1))).status_code == 200
        assert service.body_memory.num_bytes == 0

    asyncio.run(body())
