"""`RequestRecord`: what is known of an HTTP request at its end, for whoever keeps it: no prompt and no output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tensorweave.router.dispatch.timeline import Timeline


@dataclass(slots=True)
class RequestRecord:
    """Filled in by the endpoint while the request runs. Times are those of `time.perf_counter`.

    Attributes:
        status: The HTTP status; 499 if the client has gone.
        error_code: Of an answer that is an error, or that an error has ended.
        trace_parent: The header `traceparent`, if the client sent one.
        timelines: One per sequence; none if the body was refused.
        finish_reasons: Of the sequences that have ended.
        first_token_s: When the first token of any sequence was there.
    """

    request_id: str
    path: str
    began_s: float
    trace_parent: str | None = None
    status: int = 0
    error_code: str | None = None
    model: str | None = None
    is_streamed: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float | None = None
    ended_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    timelines: Sequence[Timeline] = ()

    def end(self, status: int) -> None:
        self.status = status
        for timeline in self.timelines:
            timeline.end_attempt()
        self.ended_s = time.perf_counter()

    @property
    def duration_s(self) -> float:
        assert self.ended_s is not None
        return self.ended_s - self.began_s


class Recorder(Protocol):
    """Told of each request that has ended, on the event loop: it must not wait."""

    def record(self, request: RequestRecord) -> None: ...

    def close(self) -> None: ...
