"""`AdmissionMetrics`: what admission holds, expects and refuses, read when metrics are rendered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, get_args

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorweave.router.dispatch.admission import Admission, Refusal

_REASONS: Final[tuple[Refusal, ...]] = get_args(Refusal)


class AdmissionMetrics(Collector):
    def __init__(self, model: Mapping[str, str], admission: Admission) -> None:
        self._model = list(model.values())
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        admission = self._admission
        yield self._gauge(
            "running_tokens", "Tokens of admitted requests, prompts and expected answers.", admission.running_tokens
        )
        yield self._gauge("waiting_tokens", "The same of requests that wait.", admission.waiting_tokens)
        yield self._gauge(
            "expected_wait_seconds", "How long all that waits is expected to wait.", admission.expected_wait_s
        )
        yield self._gauge("inflight_limit", "How many requests may run at the gangs now.", admission.inflight_limit)
        refused = [(reason, float(admission.refusals[reason])) for reason in _REASONS]
        yield self._counter("refused", "Requests refused, by reason.", "reason", refused)
        keys = admission.accounts()
        for name, text, values in (
            ("key_admitted", "Requests admitted, by API key.", [(key.name, float(key.num_admitted)) for key in keys]),
            ("key_refused", "Requests refused, by API key.", [(key.name, float(key.num_refused)) for key in keys]),
            (
                "key_tokens",
                "Tokens of admitted requests, prompts and expected answers, by API key.",
                [(key.name, key.admitted_tokens) for key in keys],
            ),
        ):
            yield self._counter(name, text, "key", values)
        waiting = GaugeMetricFamily(
            "tensorweave_admission_key_waiting", "Requests that wait, by API key.", labels=["model_name", "key"]
        )
        for key in keys:
            waiting.add_metric([*self._model, key.name], len(key.waiting))
        yield waiting

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"tensorweave_admission_{name}", text, labels=["model_name"])
        family.add_metric(self._model, value)
        return family

    def _counter(self, name: str, text: str, label: str, values: Sequence[tuple[str, float]]) -> CounterMetricFamily:
        family = CounterMetricFamily(f"tensorweave_admission_{name}", text, labels=["model_name", label])
        for each, value in values:
            family.add_metric([*self._model, each], value)
        return family
