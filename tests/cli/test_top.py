"""`tensorweave top`: the picture as lines that fit, as JSON, and what it says where there is nothing to watch."""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import httpx
import pytest

from tensorweave.cli import top
from tensorweave.cli.main import build_parser
from tensorweave.cluster.errors import NotReady, RequestRejected
from tests.router.admin.small_admin import SmallAdmin, gang, pool, rank, router_metrics

GAUGES = {"kv_blocks": 100.0, "kv_blocks_used": 30.0, "kv_blocks_cached": 50.0, "generation_tokens_total": 1.0}
LINK = {"megabytes_per_s": 900.0, "latency_ms": 0.2, "error": None}
FAULT = {"time_s": 900.0, "gang_id": "d-0.1", "kind": "fault", "text": "rank 0 died\x1b[2J\nof\tit"}


def status_of(admin: SmallAdmin) -> dict[str, Any]:
    answer: dict[str, Any] = admin.get("/status").json()
    return answer


def busy() -> SmallAdmin:
    decode = gang("d-0.2", rank(0, **GAUGES), kv_links={"p-0.1": LINK})
    waiting = {"gang_id": "d-1.1", "state": "starting", "epoch": 1, "reason": "no room for it", "starting": ""}
    admin = SmallAdmin(
        pool("p", gang("p-0.1", rank(0)), role="prefill"), pool("d", decode, waiting, events=[FAULT], num_faults=1)
    )
    admin.routers.note(router_metrics().report("r"))
    return admin


def test_the_lines_have_everything_and_fit() -> None:
    status = status_of(busy())
    text = "\n".join(top.lines(status, 200))
    for part in (
        "org/tiny  ok",
        "p (prefill): 1 of 1 gangs ready",
        "d (both): 1 of 2 gangs ready",
        "30+50/100",
        "10.77.0.11:4000",
        "no room for it",
        "p-0.1 to d-0.2: 900 MB/s, 0.20 ms",
        "faults of gangs 1",
        "rank 0 died?[2J?of?it",
    ):
        assert part in text
    assert max(map(len, top.lines(status, 60))) == 60


def test_busy_shares_of_pipeline_stages_are_shown() -> None:
    busy_s = {"stage_0_busy_seconds_total": 10.0}, {"stage_1_busy_seconds_total": 20.0}
    ranks = [rank(0, **GAUGES, **busy_s[0]), {**rank(1, **busy_s[1]), "stage": 1}]
    admin = SmallAdmin(pool("main", gang("m-0.1", *ranks)))
    assert "pipeline stages busy - -" in "\n".join(top.lines(status_of(admin), 200))
    admin.now_s += 40.0
    ranks[0]["gauges"]["stage_0_busy_seconds_total"] = 46.0
    ranks[1]["gauges"]["stage_1_busy_seconds_total"] = 30.0
    status = status_of(admin)
    [shown] = status["pools"][0]["gangs"]
    assert shown["stage_busy_shares"] == pytest.approx([0.9, 0.25])
    assert [each["stage"] for each in shown["ranks"]] == [0, 1]
    assert "    pipeline stages busy 90% 25%" in top.lines(status, 200)


def client_of(handler: Any) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler), base_url="http://head:8200")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (httpx.Response(401, json={"error": {"message": "the admin port requires a key"}}), RequestRejected, "a key"),
        (httpx.Response(404, json={"error": {"message": "no route: GET /status"}}), RequestRejected, "no route"),
        (httpx.Response(200, json={"status": "ok"}), RequestRejected, "not an admin port"),
        (httpx.Response(200, text="<html>"), NotReady, "no JSON"),
    ],
)
def test_what_is_no_admin_port_is_named(answer: httpx.Response, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), client_of(lambda request: answer) as client:
        top.ask(client)


def test_a_port_that_nobody_listens_on_is_named() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with pytest.raises(NotReady, match=r"head:8200.*refused"), client_of(refuse) as client:
        top.ask(client)


def args_of(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["top", *options])


def test_once_as_json_with_rates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    admin, asked = busy(), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["x-api-key"])
        admin.now_s += 5.0
        return httpx.Response(200, json=status_of(admin))

    client = functools.partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "Client", client)
    assert top.run(args_of("--once", "--json", "--admin-key", "k", "--interval", "0.5")) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["window_s"], asked) == (5.0, ["k", "k"])


@pytest.mark.parametrize("interval", ["0.1", "nan", "-1", "1e9"])
def test_an_interval_has_bounds(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        args_of("--interval", interval)
    assert "not between" in capsys.readouterr().err
