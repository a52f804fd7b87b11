"""`Timeline`: when one sequence was asked for, admitted, and computed by which gangs; for logs, metrics and traces.

asked ──queue──▶ admitted ──▶ attempt ──prefill──▶ first token ──handover──▶ decode gang's token ──decode──▶ end
                                 └── lost ──▶ attempt …
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class AttemptTimes:
    """One attempt. Times are those of `time.perf_counter`; None: it did not come so far. `handed_over_s`: the decode
    gang of a pair has its own first token. `error_code`: why the attempt was lost."""

    prefill_gang: str | None
    decode_gang: str
    began_s: float
    first_token_s: float | None = None
    handed_over_s: float | None = None
    ended_s: float | None = None
    error_code: str | None = None


@dataclass(slots=True)
class Timeline:
    asked_s: float | None = None
    admitted_s: float | None = None
    attempts: list[AttemptTimes] = field(default_factory=list)

    def ask(self) -> None:
        self.asked_s = time.perf_counter()

    def admit(self) -> None:
        self.admitted_s = time.perf_counter()

    def begin_attempt(self, prefill_gang: str | None, decode_gang: str) -> AttemptTimes:
        attempt = AttemptTimes(prefill_gang, decode_gang, time.perf_counter())
        self.attempts.append(attempt)
        return attempt

    def end_attempt(self, error_code: str | None = None) -> None:
        """End the latest attempt, unless it has ended."""
        if self.attempts and self.attempts[-1].ended_s is None:
            self.attempts[-1].ended_s = time.perf_counter()
            self.attempts[-1].error_code = error_code
