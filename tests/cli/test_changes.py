"""`tensorweave scale`, `move` and `update`: what they send, wait for and return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tensorweave.cli import changes
from tensorweave.cli.main import build_parser
from tensorweave.cluster.errors import NotReady, RequestRejected

_POOL: dict[str, Any] = {"name": "decode", "num_wanted": 3, "num_ready": 2, "is_updating": True, "update": None}


class _AdminPort:
    """Answers posts with `answer`, and `/status` with each of `looks`, the last one for ever. An empty look: the
    supervisor did not answer in time; None: nobody did."""

    def __init__(self, answer: httpx.Response, *looks: dict[str, Any] | None) -> None:
        self.posts: list[tuple[str, Any, str | None]] = []
        self._answer = answer
        self._looks = list(looks)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.posts.append((request.url.path, json.loads(request.content), request.headers.get("x-api-key")))
            return self._answer
        look = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        if look is None:
            raise httpx.ReadTimeout("too late")
        pools = [{**look, "gangs": [{}] * look["num_wanted"]}] if look else []
        return httpx.Response(200, json={"traffic": {}, "pools": pools})


def _run(monkeypatch: pytest.MonkeyPatch, port: _AdminPort, *arguments: str) -> int:
    client = httpx.Client(base_url="http://admin", transport=httpx.MockTransport(port), headers={"x-api-key": "k"})
    monkeypatch.setattr(changes, "_client", lambda args: client)
    monkeypatch.setattr("tensorweave.cli.changes.time.sleep", lambda seconds: None)
    args = build_parser().parse_args(arguments)
    code: int = args.run(args)
    return code


def test_scale_waits_until_the_gangs_are_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = _AdminPort(httpx.Response(200, json={}), _POOL, {}, None, {**_POOL, "num_ready": 3})
    assert _run(monkeypatch, port, "scale", "decode", "3", "--wait", "60") == 0
    assert port.posts == [("/scale", {"pool": "decode", "replicas": 3}, "k")]
    assert capsys.readouterr().out == "pool decode: 3 gangs are wanted\npool decode: they are ready\n"


def test_move_names_the_gang(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    port = _AdminPort(httpx.Response(200, json={"gang_id": "prefill-1.1"}), _POOL)
    assert _run(monkeypatch, port, "move", "prefill", "decode", "--timeout", "5") == 0
    assert port.posts == [("/move", {"source": "prefill", "target": "decode", "timeout_s": 5.0}, "k")]
    assert capsys.readouterr().out == "gang prefill-1.1 has moved from prefill to decode\n"


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("stopped", 1)])
def test_update_sends_the_file_and_tells_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, state: str, code: int
) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("model: m\npools: {decode: {role: both}}\n")
    ended = {**_POOL, "is_updating": False, "update": {"state": state, "text": "so it is"}}
    port = _AdminPort(httpx.Response(200, json={"replaced_pools": ["decode"]}), {}, _POOL, None, ended)
    assert _run(monkeypatch, port, "update", "--config", str(path), "--wait", "60", "--set", "router.port=9") == code
    [(_, sent, _)] = port.posts
    assert (sent["config"]["model"], sent["config"]["router"]["port"]) == ("m", 9)
    assert f"pool decode: {state}: so it is" in capsys.readouterr().out


def test_a_refusal_has_the_services_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = httpx.Response(400, json={"error": {"message": "there is no pool 'x'"}})
    with pytest.raises(RequestRejected, match="there is no pool 'x'"):
        _run(monkeypatch, _AdminPort(refusal, _POOL), "scale", "x", "1")
    with pytest.raises(NotReady, match=r"not within 0\.1 s"):
        _run(monkeypatch, _AdminPort(httpx.Response(200, json={}), _POOL), "scale", "decode", "3", "--wait", "0.1")
