"""The admin routes: the live picture as JSON, health with details, metrics of everything, and the page's chat."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from tensorweave.router.admin.status import Status
from tensorweave.router.http.app import build_app
from tests.router.admin.small_admin import HOST, MODEL, SmallAdmin, answered, gang, pool, rank, router_metrics
from tests.router.calls import check_error, scripted
from tests.router.serving import chat, make_service

LEADER = {
    "num_requests_running": 3.0,
    "num_requests_waiting": 1.0,
    "kv_blocks": 100.0,
    "kv_blocks_used": 30.0,
    "kv_blocks_cached": 50.0,
    "generation_tokens_total": 1000.0,
    "computed_prompt_tokens_total": 500.0,
    "kv_transfer_bytes_total": 4e6,
    "kv_transfer_blocks_total": 40.0,
    "kv_transfer_failures_digest_total": 1.0,
    "kv_transfer_failures_lost_total": 2.0,
    "kv_transfer_open_fetches": 1.0,
}
LINK = {"megabytes_per_s": 900.0, "latency_ms": 0.2, "error": None}
FAULT = {"time_s": 900.0, "gang_id": "d-0.1", "kind": "fault", "text": "gang d-0.1 ended: rank 0 died"}
READY = {"time_s": 910.0, "gang_id": "d-0.2", "kind": "ready", "text": "gang d-0.2 is ready"}


def some_pools(**more: float) -> list[dict[str, Any]]:
    prefill = pool("p", gang("p-0.1", rank(0)), role="prefill")
    ranks = (rank(0, **{**LEADER, **more}), rank(1, **LEADER))
    slow = {"megabytes_per_s": 5.0, "latency_ms": 3.0, "wait_ms": None, "slow": "the link carries 5 MB/s"}
    decode = gang("d-0.2", *ranks, kv_links={"p-0.1": LINK}, link=slow)
    starting = {
        "state": "starting",
        "epoch": 3,
        "reason": "no room",
        "gang_id": "d-1.3",
        "starting": "rank 0: importing",
    }
    return [prefill, pool("d", decode, starting, role="decode", num_faults=1, events=[FAULT, READY])]


def status_of(answer: httpx.Response) -> Status:
    assert answer.status_code == 200, answer.text
    return Status.model_validate_json(answer.text, strict=True)


def test_the_picture_has_everything() -> None:
    admin, metrics = SmallAdmin(*some_pools()), router_metrics()
    admin.routers.note(metrics.report("r-1"))

    async def look_twice(client: httpx.AsyncClient) -> tuple[Status, Status]:
        first = status_of(await client.get("/status"))
        metrics.count_prompt(400)
        metrics.count_cached(100)
        metrics.observe_first_token(0.15, 1)
        for _ in range(9):
            metrics.observe_step(0.012, 2)
        answered(metrics, "/v1/completions")
        admin.now_s += 10.0
        admin.pools = some_pools(generation_tokens_total=1500.0, kv_transfer_bytes_total=24e6)
        admin.routers.note(metrics.report("r-1"))
        return first, status_of(await client.get("/status"))

    first, status = admin.run(look_twice)
    assert (first.window_s, first.traffic.output_tokens_per_s, first.history) == (None, None, [])
    assert (status.health, status.model, status.version, status.window_s) == ("ok", MODEL, "1.2.3", 10.0)
    assert "1 of 2 gangs: no room" in status.reason
    assert status.traffic.output_tokens_per_s is not None
    assert status.traffic.cached_share == pytest.approx(0.25)
    assert 0.1 < (status.traffic.time_to_first_token.p50_s or 0) < 0.2
    assert 0.01 < (status.traffic.inter_token_latency.p99_s or 0) < 0.015
    assert [(router.name, router.report_age_s) for router in status.routers] == [("r-1", 0.0)]

    prefill, decode = status.pools
    assert (decode.name, decode.role, decode.num_wanted, decode.num_ready) == ("d", "decode", 2, 1)
    ready, starting = decode.gangs
    assert (ready.num_running, ready.num_waiting, ready.output_tokens_per_s) == (3, 1, 50.0)
    assert ready.blocks is not None
    assert (ready.blocks.num_total, ready.blocks.num_used, ready.blocks.num_cached) == (100, 30, 50)
    assert [(each.rank, each.host, each.pid) for each in ready.ranks] == [(0, HOST, 4000), (1, HOST, 4001)]
    assert ready.rank_link is not None
    assert ready.rank_link.slow == "the link carries 5 MB/s"
    assert (starting.state, starting.starting, starting.ranks) == ("starting", "rank 0: importing", [])
    assert prefill.gangs[0].blocks is None

    transfers, faults = status.transfers, status.faults
    assert (transfers.bytes_per_s, transfers.num_bytes, transfers.num_blocks) == (2e6, 28_000_000, 80)
    assert (transfers.num_failures, transfers.num_open) == (6, 1)
    assert [(link.source, link.target, link.megabytes_per_s) for link in transfers.links] == [("p-0.1", "d-0.2", 900.0)]
    assert (faults.num_gang_faults, [event.kind for event in faults.events]) == (1, ["ready", "fault"])
    assert len(status.history) == 1


def test_the_document_describes_the_picture() -> None:
    admin = SmallAdmin(*some_pools())
    document = admin.get("/openapi.json").json()
    answer = document["paths"]["/status"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**answer, "components": document["components"]})
    assert list(validator.iter_errors(admin.get("/status").json())) == []
    assert list(validator.iter_errors({"time_s": "now"})) != []


def test_rates_cover_half_a_minute_once_they_can() -> None:
    admin = SmallAdmin(*some_pools())

    async def look_often(client: httpx.AsyncClient) -> list[float | None]:
        spans = []
        for _ in range(50):
            spans.append(status_of(await client.get("/status")).window_s)
            admin.now_s += 1.0
        return spans

    spans = admin.run(look_often)
    assert spans[:3] == [None, 1.0, 2.0]
    assert set(spans[30:]) == {30.0}


def test_without_a_supervisor_it_says_so() -> None:
    admin = SmallAdmin()
    admin.pools = None
    status = status_of(admin.get("/status"))
    assert (status.health, status.pools) == ("unavailable", [])
    assert "the supervisor does not answer" in status.reason
    answer = admin.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert "tensorweave_pools_known" in admin.get("/metrics").text


@pytest.mark.parametrize(("age_s", "expected"), [(0.1, 200), (30.0, 503)])
def test_health_has_the_details(age_s: float, expected: int) -> None:
    answer = SmallAdmin(pool("main", gang("g", {**rank(0), "progress_age_s": age_s}))).get("/health")
    assert answer.status_code == expected
    assert answer.json()["pools"][0]["gangs"][0]["ranks"][0]["pid"] == 4000
    assert ("30.0 s" in answer.json()["reason"]) == (expected == 503)


def test_metrics_of_all_routers_gangs_and_pools() -> None:
    admin, metrics = SmallAdmin(*some_pools()), router_metrics()
    metrics.observe_first_token(0.15, 3)
    for name in ("r-1", "r-2"):
        admin.routers.note(metrics.report(name))
    text = admin.get("/metrics").text
    rows = {
        (sample.name.removeprefix("tensorweave_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def row(name: str, *labels: str) -> float:
        return rows[name, *sorted([MODEL, *labels])]

    for name in ("r-1", "r-2"):
        assert row("generation_tokens_total", name) == 3.0
        assert row("time_to_first_token_seconds_bucket", "0.2", name) == 1.0
    assert row("kv_cache_blocks_cached", "d-0.2") == 50.0
    assert row("pool_gangs", "d", "decode", "ready") == 1.0
    assert row("pool_gangs", "d", "decode", "starting") == 1.0
    assert row("pool_gangs_wanted", "d", "decode") == 2.0
    assert row("pool_gang_faults_total", "d", "decode") == 1.0
    assert row("kv_link_bytes_per_second", "d-0.2", "p-0.1") == 9e8
    assert row("gang_progress_age_seconds", "p-0.1", "p") == 0.1
    assert text.count("# TYPE tensorweave_generation_tokens_total counter") == 1


# ---- routers


def test_routers_report_more_often_while_somebody_looks_and_silent_ones_go() -> None:
    admin, metrics = SmallAdmin(), router_metrics()
    assert admin.routers.note(metrics.report("r")) == 5.0
    assert len(status_of(admin.get("/status")).routers) == 1
    assert admin.routers.note(metrics.report("r")) == 1.0
    admin.now_s += 61.0
    assert admin.routers.latest() == {}
    assert admin.routers.note(metrics.report("r")) == 5.0


def test_several_look_at_once_and_one_asks() -> None:
    admin = SmallAdmin()

    async def look(client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(client.get("/status") for _ in range(20)))

    admin.run(look)
    assert admin.num_described == 1


# ---- the page and its chat


def test_the_page_brings_everything_itself() -> None:
    admin = SmallAdmin()
    for path, media_type in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = admin.get(path)
        assert answer.headers["content-type"].startswith(media_type)
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, "it asks nobody else for anything"
        assert "innerHTML" not in text, "what it shows never becomes markup"


def chat_through(key: str | None, keys: list[str]) -> httpx.Response:
    service = make_service(scripted("Paris."))
    service.key_digests = keys
    transport = httpx.ASGITransport(app=build_app(service))
    admin = SmallAdmin(transport=transport, chat_key=key)
    body = json.dumps({**chat("Where?"), "stream": True})
    headers = {"content-type": "application/json"}
    return admin.run(lambda client: client.post("/chat", content=body, headers=headers))


def test_a_chat_goes_through_the_endpoint() -> None:
    answer = chat_through(None, [])
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == "Paris."


def test_the_endpoint_has_its_own_key_and_its_own_errors() -> None:
    digest = "sha256:2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of "key"
    assert chat_through("key", [digest]).status_code == 200
    check_error(chat_through("wrong", [digest]), 401, None, "invalid_api_key")


def test_an_endpoint_that_does_not_answer_is_named() -> None:
    admin = SmallAdmin(endpoint="http://127.0.0.1:9")
    headers = {"content-type": "application/json"}
    answer = admin.run(lambda client: client.post("/chat", content=b"{}", headers=headers))
    check_error(answer, 503, None, "not_ready")
    assert "http://127.0.0.1:9" in answer.json()["error"]["message"]


def test_a_chat_that_is_too_large_is_refused() -> None:
    admin = SmallAdmin()
    headers = {"content-type": "application/json"}
    answer = admin.run(lambda client: client.post("/chat", content=b" " * (2 << 20), headers=headers))
    check_error(answer, 413, None, "body_too_large")
