"""Prometheus metrics of one router replica, with vLLM's names and the prefix `tensorweave_` where vLLM has one.

Each app has its own registry; nothing is global. Labels are bound once: an observation takes about a microsecond. The
admin port shows what `RouterMetrics.report` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorweave.cluster.errors import NotReady, TensorweaveError
from tensorweave.cluster.fleet import Fleet
from tensorweave.cluster.router_report import MetricRows, RouterReport
from tensorweave.router.dispatch.counts import DispatchCounts
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.admission_metrics import AdmissionMetrics
from tensorweave.router.http.health import gang_gauges
from tensorweave.router.http.request_record import RequestRecord

_LATENCY_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_LATENCY_S: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)

# What a gang's leader reports of its executor: the metric's name and description.
_OF_GANGS: Final = {
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "KV blocks in use, 1 is all."),
    "kv_blocks": ("kv_cache_blocks", "KV blocks that the gang has."),
    "kv_blocks_used": ("kv_cache_blocks_used", "KV blocks that requests hold."),
    "kv_blocks_cached": (
        "kv_cache_blocks_cached",
        "KV blocks that no request holds, kept for prompts with the same prefix.",
    ),
    "num_requests_running": ("gang_num_requests_running", "Sequences that hold KV blocks."),
    "num_requests_waiting": ("gang_num_requests_waiting", "Sequences that wait for KV blocks or a place in the batch."),
    "num_preemptions_total": ("gang_preemptions", "Sequences paused for want of KV blocks, since the gang began."),
    "computed_prompt_tokens_total": ("gang_computed_prompt_tokens", "Prompt tokens computed since the gang began."),
    "generation_tokens_total": ("gang_generation_tokens", "Tokens generated since the gang began."),
    "draft_tokens_total": ("gang_draft_tokens", "Tokens drafted and verified since the gang began."),
    "accepted_draft_tokens_total": (
        "gang_accepted_draft_tokens",
        "Drafted tokens that were right, since the gang began.",
    ),
    "requests_not_finite_total": (
        "gang_requests_not_finite",
        "Sequences that ended because the model's logits were NaN or infinite, since the gang began.",
    ),
    "grammars_cached": ("gang_grammars_cached", "Grammars that are compiled and kept for later requests."),
    "grammars_refused_total": ("gang_grammars_refused", "Grammars that were refused, since the gang began."),
    "iterations_total": ("gang_iterations", "Steps since the gang began."),
    "step_seconds_total": ("gang_step_seconds", "Time in steps since the gang began."),
    "forward_seconds_total": ("gang_forward_seconds", "Time in forward passes since the gang began."),
}


class _Dispatches(Collector):
    """The dispatcher's own counts, read when metrics are rendered."""

    def __init__(self, model: dict[str, str], counts: DispatchCounts) -> None:
        self._model = list(model.values())
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._by(
            "request_retries", "Attempts that were lost and replayed, by what was lost.", "reason", counts.retries
        )
        yield self._by("request_faults", "What went wrong without costing a replay.", "reason", counts.faults)
        yield self._by("request_plans", "Attempts, by a pair of gangs (joint) or one (alone).", "kind", counts.routes)
        yield self._one("requests_recovered", "Sequences that ended well after a replay.", counts.num_recovered)
        yield self._one("requests_reattached", "Sequences taken over from a lost router.", counts.num_reattached)

    def _by(self, name: str, text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
        family = CounterMetricFamily(f"tensorweave_{name}", text, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([*self._model, key], value)
        return family

    def _one(self, name: str, text: str, value: int) -> CounterMetricFamily:
        family = CounterMetricFamily(f"tensorweave_{name}", text, labels=["model_name"])
        family.add_metric(self._model, value)
        return family


class GangMetrics(Collector):
    """The latest gauges of all present gangs. Those that are not in the table (KV transfer, for example) keep their
    names; those that end in `_total` are counters."""

    def __init__(self, model: dict[str, str]) -> None:
        self.gauges: Mapping[str, Mapping[str, float]] = {}
        self._model = list(model.values())

    def collect(self) -> Iterator[Metric]:
        for name in dict.fromkeys(name for values in self.gauges.values() for name in values):
            plain = name.removesuffix("_total")
            shown, text = _OF_GANGS.get(name, (plain, f"The gang's {plain.replace('_', ' ')}, as its ranks report it."))
            kind = GaugeMetricFamily if name == plain else CounterMetricFamily
            family = kind(f"tensorweave_{shown}", text, labels=["model_name", "gang"])
            for gang_id, values in self.gauges.items():
                if name in values:
                    family.add_metric([*self._model, gang_id], values[name])
            yield family


class RouterMetrics:
    def __init__(self, model_name: str, dispatcher: Dispatcher) -> None:
        self.registry = CollectorRegistry()
        self._model = {"model_name": model_name}
        self._finished = self._counter("request_success", "Sequences that ended, by finish reason.", "finished_reason")
        self._answered = self._counter("http_requests", "HTTP requests, by path and status.", "path", "status")
        self._rejected = self._counter(
            "requests_rejected", "Requests that were answered with an error, by its code.", "code"
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of all requests.").labels(**self._model)
        self._cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.").labels(
            **self._model
        )
        self._output_tokens = self._counter("generation_tokens", "Generated tokens.").labels(**self._model)
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From a request's receipt to its first token.", _LATENCY_S
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between two steps of one sequence.", _TOKEN_LATENCY_S
        )
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "A sequence's mean time per token after the first.", _TOKEN_LATENCY_S
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From a request's receipt to its last token.", _LATENCY_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "Between a sequence's arrival at the dispatcher and its admission.",
            _LATENCY_S,
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Between an attempt's start and its first token.", _LATENCY_S
        )
        self._handover = self._histogram(
            "kv_handover_time_seconds",
            "Between the prefill gang's first token and the decode gang's own, for which it has the prompt's KV.",
            _LATENCY_S,
        )
        self._of_gangs = b""
        self._gauge("num_requests_running", "Sequences admitted and not ended.").set_function(
            lambda: dispatcher.num_running
        )
        self._gauge("num_requests_waiting", "Sequences waiting for admission.").set_function(
            lambda: dispatcher.num_waiting
        )
        self.registry.register(_Dispatches(self._model, dispatcher.counts))
        self.registry.register(AdmissionMetrics(self._model, dispatcher.admission))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tensorweave_{name}", text, ["model_name", *labels], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"tensorweave_{name}", text, ["model_name"], registry=self.registry).labels(**self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tensorweave_{name}", text, ["model_name"], buckets=buckets, registry=self.registry).labels(
            **self._model
        )

    def count_answer(self, request: RequestRecord) -> None:
        self._answered.labels(**self._model, path=request.path, status=request.status).inc()
        for timeline in request.timelines:
            if timeline.admitted_s is not None and timeline.asked_s is not None:
                self._queue.observe(timeline.admitted_s - timeline.asked_s)
            for attempt in timeline.attempts:
                if attempt.first_token_s is not None:
                    self._prefill.observe(attempt.first_token_s - attempt.began_s)
                    if attempt.handed_over_s is not None:
                        self._handover.observe(attempt.handed_over_s - attempt.first_token_s)

    def count_error(self, error: TensorweaveError) -> None:
        self._rejected.labels(**self._model, code=error.code).inc()

    def count_prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def count_cached(self, num_tokens: int) -> None:
        self._cached_tokens.inc(num_tokens)

    def observe_first_token(self, seconds: float, num_tokens: int) -> None:
        self._ttft.observe(seconds)
        self._output_tokens.inc(num_tokens)

    def observe_step(self, seconds: float, num_tokens: int) -> None:
        self._itl.observe(seconds)
        self._output_tokens.inc(num_tokens)

    def observe_end(self, finish_reason: str, *, total_s: float, after_first_s: float, num_tokens: int) -> None:
        self._finished.labels(**self._model, finished_reason=finish_reason).inc()
        self._e2e.observe(total_s)
        if num_tokens > 1:
            self._tpot.observe(after_first_s / (num_tokens - 1))

    def report(self, router: str) -> RouterReport:
        """This replica's own metrics, without those of the gangs, for the admin port."""
        families = [
            MetricRows(
                family.name,
                family.type,
                family.documentation,
                tuple((row.name, tuple(row.labels.items()), row.value) for row in family.samples),
            )
            for family in self.registry.collect()
        ]
        return RouterReport(router, time.monotonic(), tuple(families))

    async def render(self, fleet: Fleet) -> bytes:
        """The text exposition. If the fleet does not answer, the gangs' last values are rendered."""
        with contextlib.suppress(NotReady):
            gauges = gang_gauges(await fleet.last_description())
            self._of_gangs = await asyncio.to_thread(self._render_gangs, gauges)  # 0.2 s for 1,000 gangs
        return generate_latest(self.registry) + self._of_gangs

    def _render_gangs(self, gauges: Mapping[str, Mapping[str, float]]) -> bytes:
        gangs, registry = GangMetrics(self._model), CollectorRegistry()
        gangs.gauges = gauges
        registry.register(gangs)
        return generate_latest(registry)
