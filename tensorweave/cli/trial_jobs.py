"""What a service under trial is asked: a fixed set of streamed requests, each with the answer that it must get."""

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
class Answer:
    """What must not change."""

    text: str
    finish_reason: str
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Job:
    """One request, to be asked again and again; `answer` is the oracle's. With `is_fresh` no prefix cache ever has its
    prompt, so that it is computed, and handed over, each time."""

    path: str
    body: dict[str, Any]
    is_fresh: bool = False
    answer: Answer | None = None

    def body_as(self, request_id: str) -> dict[str, Any]:
        return {**self.body, "cache_salt": request_id} if self.is_fresh else self.body


def make_jobs(model: str, count: int, seed: int) -> list[Job]:
    """Completions and chats, greedy and seeded sampling, short and long; the same for the same seed."""
    draws = random.Random(seed)
    return [_job(model, number, draws) for number in range(count)]


def _job(model: str, number: int, draws: random.Random) -> Job:
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
        return Job("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}, is_fresh)
    return Job("/v1/completions", {**body, "prompt": text}, is_fresh)


def with_stop_string(job: Job) -> Job:
    """The same job, to be ended half-way by a stop string that is taken from its own answer, across a token's edge."""
    assert job.answer is not None
    text = job.answer.text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    return job if len(stop) < 3 or "\ufffd" in stop else replace(job, body={**job.body, "stop": [stop]})


def answer_of(timeline: Timeline) -> Answer:
    """Of a stream that has come to its end."""
    assert timeline.finish_reason is not None
    counts = timeline.usage
    return Answer(timeline.text, timeline.finish_reason, int(counts["prompt_tokens"]), int(counts["completion_tokens"]))
