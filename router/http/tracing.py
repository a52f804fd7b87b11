"""`Tracing`: an OpenTelemetry trace per request, from the times that the router has taken (`tracing.endpoint`).

    POST /v1/chat/completions                       the request, continued from the client's `traceparent`
    ├── queue                                       until it is admitted
    └── attempt                                     one per gang, or pair of gangs, that ran it
        ├── prefill                                 until the first token
        ├── kv handover                             from there until the decode gang's own first token (pairs)
        └── decode                                  until the end

Spans are made when the request has ended, so that a trace costs nothing while it runs. They have no prompt and no
output. OpenTelemetry is imported here only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tensorweave.router.dispatch.timeline import AttemptTimes, Timeline
from tensorweave.router.http.request_record import RequestRecord

_CLOSE_TIMEOUT_S: Final = 5.0
_EXPORT_TIMEOUT_S: Final = 10.0
_OPERATIONS: Final = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


@dataclass(frozen=True, slots=True)
class _Part:
    """A span to be made: its name, times of `time.perf_counter`, attributes, and the parts within it."""

    name: str
    began_s: float
    ended_s: float
    attributes: dict[str, Any]
    error_code: str | None = None
    within: tuple[_Part, ...] = ()


class Tracing:
    """A `Recorder`. `provider` decides which traces are kept and where they are sent."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tensorweave")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def record(self, request: RequestRecord) -> None:
        given = {} if request.trace_parent is None else {"traceparent": request.trace_parent}
        self._add(_request(request), self._propagator.extract(given), SpanKind.SERVER, is_failure=request.status >= 500)

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)

    def _add(self, part: _Part, context: Context, kind: SpanKind, *, is_failure: bool) -> None:
        span = self._tracer.start_span(
            part.name, context, kind, attributes=part.attributes, start_time=self._time_ns(part.began_s)
        )
        if part.error_code is not None:
            span.set_attribute("error.type", part.error_code)
        if is_failure or (part.error_code is not None and kind is SpanKind.INTERNAL):
            span.set_status(Status(StatusCode.ERROR))
        inside = trace.set_span_in_context(span, context)
        for each in part.within:
            self._add(each, inside, SpanKind.INTERNAL, is_failure=False)
        span.end(self._time_ns(part.ended_s))

    def _time_ns(self, seconds: float) -> int:
        return self._epoch_ns + round(seconds * 1e9)


def otlp_tracing(endpoint: str, share: float, service_name: str, instance: str) -> Tracing:
    """Sends to a collector over OTLP/HTTP. `share`: of the traces that no client has begun, how many are kept. Raises
    ImportError if the exporter is not installed."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return exported_tracing(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S), share, service_name, instance)


def exported_tracing(exporter: SpanExporter, share: float, service_name: str, instance: str) -> Tracing:
    resource = Resource.create({"service.name": service_name, "service.instance.id": instance})
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(share)), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


# ---- from a record to its parts


def _request(request: RequestRecord) -> _Part:
    assert request.ended_s is not None
    attributes: dict[str, Any] = {
        "http.request.method": "POST",
        "http.route": request.path,
        "http.response.status_code": request.status,
        "gen_ai.operation.name": _OPERATIONS.get(request.path, "chat"),
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": request.num_output_tokens,
        "gen_ai.response.finish_reasons": tuple(request.finish_reasons),
        "tensorweave.request_id": request.request_id,
        "tensorweave.cached_tokens": request.num_cached_tokens,
        "tensorweave.stream": request.is_streamed,
    }
    if request.model is not None:
        attributes["gen_ai.request.model"] = request.model
    parts = [
        part
        for number, timeline in enumerate(request.timelines)
        for part in _sequence(number, timeline, request.ended_s)
    ]
    return _Part(f"POST {request.path}", request.began_s, request.ended_s, attributes, request.error_code, tuple(parts))


def _sequence(number: int, timeline: Timeline, end_s: float) -> Iterator[_Part]:
    own: dict[str, Any] = {"tensorweave.sequence": number}
    if timeline.asked_s is not None:
        admitted_s = end_s if timeline.admitted_s is None else timeline.admitted_s
        yield _Part("queue", timeline.asked_s, admitted_s, own)
    for count, attempt in enumerate(timeline.attempts, start=1):
        ended_s = end_s if attempt.ended_s is None else attempt.ended_s
        attributes: dict[str, Any] = {**own, "tensorweave.attempt": count, **_gangs(attempt)}
        yield _Part(
            "attempt", attempt.began_s, ended_s, attributes, attempt.error_code, tuple(_phases(attempt, ended_s))
        )


def _gangs(attempt: AttemptTimes) -> dict[str, str]:
    prefill = {} if attempt.prefill_gang is None else {"tensorweave.prefill_gang": attempt.prefill_gang}
    return {**prefill, "tensorweave.decode_gang": attempt.decode_gang}


def _phases(attempt: AttemptTimes, ended_s: float) -> Iterator[_Part]:
    first_s, handed_s = attempt.first_token_s, attempt.handed_over_s
    source, target = attempt.prefill_gang or attempt.decode_gang, attempt.decode_gang
    if first_s is None and handed_s is not None:  # the decode gang was first, with KV or without
        first_s = handed_s
    yield _Part("prefill", attempt.began_s, ended_s if first_s is None else first_s, {"tensorweave.gang": source})
    if first_s is None:
        return
    if attempt.prefill_gang is not None:
        handover = {"tensorweave.source": source, "tensorweave.target": target}
        yield _Part("kv handover", first_s, ended_s if handed_s is None else handed_s, handover)
        if handed_s is None:
            return
        first_s = handed_s
    yield _Part("decode", first_s, ended_s, {"tensorweave.gang": target})
