"""Whose request it is comes from the API key, and metrics show what admission did, by key."""

from __future__ import annotations

import asyncio
import hashlib

import httpx

from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.app import build_app
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import chat, client_of, make_service, model_info, script_of, until

KEYS = ("key of the first client", "key of the second client")
DIGESTS = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS]


def test_metrics_show_admission_by_key() -> None:
    asyncio.run(_ask_and_read())


async def _ask_and_read() -> None:
    link = FakeLink(model_info(), script=script_of("Hello"), faults=[Fault("stall")])
    service = make_service(link, limits=Limits(max_inflight=1, max_queued=1))
    service.key_digests = [f"sha256:{digest}" for digest in DIGESTS]

    async def ask(client: httpx.AsyncClient, headers: dict[str, str]) -> int:
        return (await client.post("/v1/chat/completions", json=chat(), headers=headers)).status_code

    async with client_of(build_app(service)) as client:
        first, second = {"authorization": f"Bearer {KEYS[0]}"}, {"x-api-key": KEYS[1]}
        tasks = [asyncio.create_task(ask(client, first)) for _ in range(2)]
        await until(lambda: service.dispatcher.num_waiting == 1)
        assert await ask(client, first) == 429
        assert await ask(client, second) == 429
        link.goes_on.set()
        assert await asyncio.gather(*tasks) == [200, 200]
        text = (await client.get("/metrics", headers=second)).text
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tensorweave_admission_"))
    model = 'model_name="org/tiny"'
    names = [digest[:12] for digest in DIGESTS]
    assert float(rows[f'tensorweave_admission_key_admitted_total{{key="{names[0]}",{model}}}']) == 2
    assert float(rows[f'tensorweave_admission_key_refused_total{{key="{names[0]}",{model}}}']) == 1
    assert float(rows[f'tensorweave_admission_key_refused_total{{key="{names[1]}",{model}}}']) == 1
    assert float(rows[f'tensorweave_admission_key_waiting{{key="{names[0]}",{model}}}']) == 0
    assert float(rows[f'tensorweave_admission_refused_total{{{model},reason="full"}}']) == 2
    assert float(rows[f"tensorweave_admission_inflight_limit{{{model}}}"]) == 1
    assert not any(key in text for key in KEYS)
