"""The requests to a service under trial: a fixed set of streams, each with the answer that it must get."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Final

from tensorweave.cli.http_stream import Timeline

_WORDS: Final = (
    *("the", "of", "and", "water", "light", "under", "every", "small", "river", "stone", "naïve", "été", "answer"),
    *("because", "tomorrow", "seven", "paper", "window", "quiet", "東京", "green", "engine", "between", "morning"),
    *("table", "😀", "bread", "letter", "without", "mountain", "never"),
)
_NUM_WORDS: Final = (1, 3, 8, 20, 50, 110)
_NUM_TOKENS: Final = (48, 400, 160, 700, 300)


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """What must be the same each time."""

    text: str
    finish_reason: str
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """A request that is sent repeatedly; `answer` is the oracle's. If it `is_fresh`, no prefix cache ever has its
    prompt, so that it is computed, and transferred, each time."""

    path: str
    body: dict[str, Any]
    is_fresh: bool = False
    answer: RecordedAnswer | None = None

    def body_as(self, request_id: str) -> dict[str, Any]:
        return {**self.body, "cache_salt": request_id} if self.is_fresh else self.body


def make_requests(model: str, count: int, seed: int) -> list[TrialRequest]:
    """Completions and chats, greedy and seeded sampling, short and long; the same for the same seed."""
    draws = random.Random(seed)
    return [_job(model, number, draws) for number in range(count)]


def _job(model: str, number: int, draws: random.Random) -> TrialRequest:
    words = [draws.choice(_WORDS) for _ in range(_NUM_WORDS[number % len(_NUM_WORDS)])]
    text = f"{number}: {' '.join(words)}"
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": _NUM_TOKENS[number % len(_NUM_TOKENS)],
        "ignore_eos": number % 7 != 0,
        "temperature": 0,
    }
    if number % 2:
        body |= {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": draws.randrange(2**31)}
    is_fresh = number % 3 != 0
    if number % 5 == 0:
        return TrialRequest("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}, is_fresh)
    return TrialRequest("/v1/completions", {**body, "prompt": text}, is_fresh)


def with_stop_string(job: TrialRequest) -> TrialRequest:
    """The same request with a stop string from the middle of its own answer, possibly across tokens."""
    assert job.answer is not None
    text = job.answer.text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    return job if len(stop) < 3 or "\ufffd" in stop else replace(job, body={**job.body, "stop": [stop]})


def answer_of(timeline: Timeline) -> RecordedAnswer:
    """The answer of a stream that has ended."""
    assert timeline.finish_reason is not None
    counts = timeline.usage
    return RecordedAnswer(
        timeline.text, timeline.finish_reason, int(counts["prompt_tokens"]), int(counts["completion_tokens"])
    )
