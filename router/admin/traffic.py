"""What the routers did between two moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tensorweave.router.admin import figures
from tensorweave.router.admin.figures import RouterFigures
from tensorweave.router.admin.status import Percentiles, Traffic

_SHARES: Final = (0.5, 0.9, 0.99)


def traffic_between(before: Mapping[str, RouterFigures], now: Mapping[str, RouterFigures]) -> Traffic:
    prompts = figures.rate(before, now, "prompt_tokens_total")
    cached = figures.rate(before, now, "prompt_tokens_cached_total")
    return Traffic(
        num_running=int(figures.total(now, "num_requests_running")),
        num_waiting=int(figures.total(now, "num_requests_waiting")),
        waiting_tokens=int(figures.total(now, "admission_waiting_tokens")),
        expected_wait_s=max(
            (router.totals.get("admission_expected_wait_seconds", 0.0) for router in now.values()), default=0.0
        ),
        refused_per_s=figures.rate(before, now, "admission_refused_total"),
        requests_per_s=figures.rate(before, now, "http_requests_total"),
        prompt_tokens_per_s=prompts,
        cached_share=min(1.0, cached / prompts) if prompts and cached is not None else None,
        output_tokens_per_s=figures.rate(before, now, "generation_tokens_total"),
        time_to_first_token=_percentiles(before, now, "time_to_first_token_seconds"),
        inter_token_latency=_percentiles(before, now, "inter_token_latency_seconds"),
        request_latency=_percentiles(before, now, "e2e_request_latency_seconds"),
    )


def _percentiles(before: Mapping[str, RouterFigures], now: Mapping[str, RouterFigures], name: str) -> Percentiles:
    p50, p90, p99 = figures.percentiles(figures.observed(before, now, name), _SHARES)
    return Percentiles(p50_s=p50, p90_s=p90, p99_s=p99)
