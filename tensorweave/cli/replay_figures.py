"""What a replay amounts to: latencies, goodput, prefix hits."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorweave.cli.figures import distribution
from tensorweave.cli.goodput_load import LatencyLimits
from tensorweave.cli.replay_trace import Trace


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times count from its arrival; `error` is why it has no answer."""

    num_prompt: int
    num_cached: int = 0
    num_output: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    error: str | None = None

    @property
    def itl_s(self) -> float:
        return (self.total_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else 0.0

    def is_good(self, limits: LatencyLimits) -> bool:
        return self.error is None and self.ttft_s <= limits.ttft_s and self.itl_s <= limits.itl_s


def replay_figures(
    trace: Trace, outcomes: Sequence[Outcome], duration_s: float, limits: LatencyLimits
) -> dict[str, Any]:
    answered = [outcome for outcome in outcomes if outcome.error is None]
    num_prompt = sum(outcome.num_prompt for outcome in answered)
    num_good = sum(outcome.is_good(limits) for outcome in outcomes)
    return {
        "num_requests": len(outcomes),
        "num_answered": len(answered),
        "errors": dict(collections.Counter(outcome.error for outcome in outcomes if outcome.error)),
        "duration_s": round(duration_s, 3),
        "ttft_s": _short([outcome.ttft_s for outcome in answered]),
        "itl_s": _short([outcome.itl_s for outcome in answered if outcome.num_output > 1]),
        "total_s": _short([outcome.total_s for outcome in answered]),
        "goodput_per_s": round(num_good / duration_s, 4),
        "good_share": round(num_good / len(outcomes), 4),
        "output_tokens_per_s": round(sum(outcome.num_output for outcome in answered) / duration_s, 2),
        "hit_rate": round(sum(outcome.num_cached for outcome in answered) / max(1, num_prompt), 4),
        "ideal_hit_rate": round(trace.ideal_hit_rate(), 4),
    }


def _short(values: Sequence[float]) -> dict[str, float]:
    figures = distribution(values)
    return {name: figures[name] for name in ("mean", "median", "p90", "p99", "max") if name in figures}
