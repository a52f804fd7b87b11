"""A replay against a running service: each request is sent when its time has come, whatever has been answered."""

from __future__ import annotations

import asyncio
import time

from tensorweave.cli.http_stream import Connection, RequestFailed
from tensorweave.cli.replay_figures import Outcome
from tensorweave.cli.replay_trace import Trace, TraceRequest


async def replay_over_http(
    trace: Trace, url: str, model: str, vocab_size: int, api_key: str | None, timeout_s: float
) -> tuple[list[Outcome], float]:
    """The outcomes in the trace's order, and how long it took."""
    prompts = [trace.prompt(request, vocab_size) for request in trace.requests]
    began_s = time.perf_counter()
    tasks = []
    for request, prompt in zip(trace.requests, prompts, strict=True):
        await asyncio.sleep(began_s + request.arrival_s - time.perf_counter())
        tasks.append(asyncio.create_task(_ask(Connection(url, api_key, timeout_s), model, request, prompt)))
    outcomes = list(await asyncio.gather(*tasks))
    return outcomes, time.perf_counter() - began_s


async def _ask(connection: Connection, model: str, asked: TraceRequest, prompt: list[int]) -> Outcome:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": asked.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        timeline = await connection.stream("/v1/completions", body)
    except RequestFailed as error:
        return Outcome(asked.num_prompt, error=error.kind)
    finally:
        connection.close()
    cached = (timeline.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Outcome(asked.num_prompt, cached, timeline.num_output, timeline.ttft_s, timeline.e2e_s)
