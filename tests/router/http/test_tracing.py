"""One trace per request: the parts of its way with their times, lost attempts too, and nothing of what was said."""

from __future__ import annotations

import asyncio
import http.server
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tensorweave.router.http import tracing
from tensorweave.router.http.app import build_app
from tensorweave.router.http.tracing import Tracing, exported_tracing, otlp_tracing
from tests.http_server import serving
from tests.router.calls import CHAT, COMPLETIONS, scripted
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import MODEL, ONE_ATTEMPT, PATIENCE_S, chat, client_of, completion, make_service, model_info

SECRET = "xyzzy-of-the-prompt"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-2] + "00"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not sent in time is lost, and sent again it is there twice."""
    monkeypatch.setattr(tracing, "_CLOSE_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(tracing, "_EXPORT_TIMEOUT_S", PATIENCE_S)


def send(
    recorder: Tracing, path: str, body: Any, links: Sequence[FakeLink], headers: dict[str, str], **options: Any
) -> httpx.Response:
    service = make_service(*links, **options)
    service.recorders = [recorder]

    async def call() -> httpx.Response:
        async with client_of(build_app(service)) as client:
            return await client.post(path, json=body, headers=headers)

    answer = asyncio.run(call())
    recorder.close()
    return answer


def spans_of(
    path: str, body: Any, *links: FakeLink, share: float = 1.0, parent: str | None = None, **options: Any
) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    headers = {} if parent is None else {"traceparent": parent}
    send(exported_tracing(exporter, share, "svc", "router-1"), path, body, links, headers, **options)
    spans = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    assert "xyzzy" not in "".join(span.to_json() for span in spans)
    return spans


def tree(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    """Nested names; each span lies within its parent's time and is of one trace."""
    assert len({span.context.trace_id for span in spans}) == 1
    by_id = {span.context.span_id: span for span in spans}
    nested: dict[int, dict[str, Any]] = {span_id: {} for span_id in by_id}
    top: dict[str, Any] = {}
    for span in spans:
        above = by_id.get(span.parent.span_id) if span.parent is not None else None
        place = top if above is None else nested[above.context.span_id]
        name = span.name if span.name not in place else f"{span.name} again"
        place[name] = nested[span.context.span_id]
        if above is not None:
            assert (above.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0) <= (above.end_time or 0)
    return top


def named(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    return next(span for span in spans if span.name == name)


def pair() -> list[FakeLink]:
    info = model_info()
    return [FakeLink(info, gang_id="p-0", role="prefill"), FakeLink(info, gang_id="d-0", role="decode", step_s=0.01)]


LONG = {**completion(SECRET + " word" * 70), "max_tokens": 4}


def test_from_the_request_through_prefill_handover_and_decode() -> None:
    spans = spans_of(COMPLETIONS, LONG, *pair())
    parts = {"prefill": {}, "kv handover": {}, "decode": {}}
    assert tree(spans) == {"POST /v1/completions": {"queue": {}, "attempt": parts}}
    request, attempt = named(spans, "POST /v1/completions"), named(spans, "attempt")
    assert request.kind is SpanKind.SERVER
    assert (
        dict(request.resource.attributes).items() >= {"service.name": "svc", "service.instance.id": "router-1"}.items()
    )
    attributes = dict(request.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == MODEL
    assert attributes["gen_ai.usage.output_tokens"] == 4
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    gangs = dict(attempt.attributes or {})
    assert (gangs["tensorweave.prefill_gang"], gangs["tensorweave.decode_gang"]) == ("p-0", "d-0")
    assert dict(named(spans, "prefill").attributes or {})["tensorweave.gang"] == "p-0"
    assert dict(named(spans, "decode").attributes or {})["tensorweave.gang"] == "d-0"


def test_one_gang_alone_and_the_clients_own_trace() -> None:
    spans = spans_of(CHAT, {**chat(SECRET), "stream": True}, scripted(), parent=PARENT)
    assert tree(spans) == {"POST /v1/chat/completions": {"queue": {}, "attempt": {"prefill": {}, "decode": {}}}}
    request = named(spans, "POST /v1/chat/completions")
    assert f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    assert dict(request.attributes or {})["gen_ai.operation.name"] == "chat"


def test_a_lost_attempt_is_a_part_of_its_own() -> None:
    links = [FakeLink(model_info(), gang_id=name, faults=[Fault("error", 2)]) for name in ("g-0", "g-1")]
    spans = spans_of(COMPLETIONS, {**completion(SECRET), "max_tokens": 5}, *links)
    attempts = [span for span in spans if span.name == "attempt"]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert dict(attempts[0].attributes or {})["error.type"] == "worker_lost"
    assert named(spans, "POST /v1/completions").status.status_code is StatusCode.UNSET


def test_failures_and_refusals() -> None:
    broken = FakeLink(model_info(), faults=[Fault("error", 0, closes=True)])
    failed = named(spans_of(COMPLETIONS, completion(SECRET), broken, limits=ONE_ATTEMPT), "POST /v1/completions")
    assert failed.status.status_code is StatusCode.ERROR
    assert dict(failed.attributes or {})["error.type"] == "worker_lost"
    [refused] = spans_of(COMPLETIONS, {"prompt": SECRET, "best_off": 1}, scripted())
    assert refused.status.status_code is StatusCode.UNSET, "the client's fault"
    assert dict(refused.attributes or {})["http.response.status_code"] == 400


@pytest.mark.parametrize(
    ("share", "parent", "is_kept"),
    [(0.0, None, False), (0.0, PARENT, True), (1.0, UNSAMPLED, False), (1.0, "00-garbage", True), (1.0, "", True)],
)
def test_which_traces_are_kept(share: float, parent: str | None, is_kept: bool) -> None:
    assert bool(spans_of(COMPLETIONS, completion(SECRET), scripted(), share=share, parent=parent)) == is_kept


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return None

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies


def test_a_collector_gets_them_over_otlp() -> None:
    with collector() as (endpoint, bodies):
        send(otlp_tracing(endpoint, 1.0, "svc", "router-1"), COMPLETIONS, LONG, pair(), {})
    names = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names += [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/completions", "attempt", "decode", "kv handover", "prefill", "queue"]


def test_a_collector_that_is_gone_delays_the_end_a_little_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(tracing, "_EXPORT_TIMEOUT_S", 1.0)  # its thread ends soon, and logs nothing into other tests
    recorder = otlp_tracing("http://127.0.0.1:9/v1/traces", 1.0, "svc", "r")
    assert send(recorder, COMPLETIONS, completion(), [scripted()], {}).status_code == 200
