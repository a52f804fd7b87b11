"""Load on an OpenAI completions endpoint from several processes, so that the client is not what is measured.

A client sends its prompts one after the other, from its start time on, and stops after a failure.
`benchmarks/http_rivals.py` uses it for both servers.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.figures import distribution
from tensorweave.cli.http_stream import Connection, RequestFailed, Timeline

CLIENTS_PER_PROCESS = 32
MAX_PROCESSES = 8
START_DELAY_S = 0.5
"""Until the load begins: all processes have their clients by then."""


class EventTimeline(Timeline):
    """Every event of a choice counts as an arrival, as in `vllm bench serve`: a token may have no text yet."""

    def add(self, event: dict[str, Any], now_s: float) -> None:
        num_before = len(self.piece_s)
        super().add(event, now_s)
        if event.get("choices") and len(self.piece_s) == num_before:
            self.piece_s.append(now_s)


@dataclass(frozen=True, slots=True)
class Client:
    """`group` tells the answers of different kinds of clients apart. `start_s` counts from the start of the load."""

    prompts: Sequence[Sequence[int]]
    output_len: int
    group: str = ""
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Times in seconds from the start of the load; `error` is empty if the request succeeded."""

    group: str
    sent_s: float
    arrivals_s: tuple[float, ...]
    num_output: int
    num_prompt: int
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.num_output - 1)

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """(when, how long) of each pause between two arrivals."""
        return [(after, after - before) for before, after in pairwise(self.arrivals_s)]


def run_clients(url: str, model: str, clients: Sequence[Client], timeout_s: float) -> list[Answer]:
    """Run all clients; a request that takes longer than `timeout_s` fails."""
    num_processes = max(1, min(MAX_PROCESSES, -(-len(clients) // CLIENTS_PER_PROCESS)))
    shares = [clients[place::num_processes] for place in range(num_processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        list(pool.map(_start, range(num_processes)))
        began_s = time.perf_counter() + START_DELAY_S
        runs = [pool.submit(_run_share, url, model, share, began_s, timeout_s) for share in shares]
        return [answer for run in runs for answer in run.result()]


def _start(_: int) -> None:
    """Start one process and import this module; long enough that each gets one."""
    time.sleep(0.3)


def _run_share(url: str, model: str, clients: Sequence[Client], began_s: float, timeout_s: float) -> list[Answer]:
    return asyncio.run(_together(url, model, clients, began_s, timeout_s))


async def _together(url: str, model: str, clients: Sequence[Client], began_s: float, timeout_s: float) -> list[Answer]:
    runs = await asyncio.gather(*(_run_client(url, model, client, began_s, timeout_s) for client in clients))
    return [answer for run in runs for answer in run]


async def _run_client(url: str, model: str, client: Client, began_s: float, timeout_s: float) -> list[Answer]:
    connection, answers = Connection(url, timeout_s=timeout_s), []
    await asyncio.sleep(max(0.0, began_s + client.start_s - time.perf_counter()))
    for prompt in client.prompts:
        timeline, error = EventTimeline(time.perf_counter()), ""
        try:
            await connection.stream("/v1/completions", body(model, prompt, client.output_len), timeline=timeline)
        except RequestFailed as failure:
            error = str(failure)
        if not error and timeline.num_output != client.output_len:
            error = f"{timeline.num_output} tokens instead of {client.output_len}"
        arrivals_s = tuple(piece_s - began_s for piece_s in timeline.piece_s)
        sent_s = timeline.sent_s - began_s
        answers.append(Answer(client.group, sent_s, arrivals_s, timeline.num_output, len(prompt), error))
        if error:
            break
    connection.close()
    return answers


def body(model: str, prompt: Sequence[int], output_len: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def load_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates and latencies of a load whose clients all started at once."""
    good = [answer for answer in answers if not answer.error]
    elapsed_s = max((answer.arrivals_s[-1] for answer in good), default=0.0)
    many = [answer for answer in good if answer.num_output > 1]
    return {
        "num_answered": len(good),
        "num_failed": len(answers) - len(good),
        "first_error": next((answer.error for answer in answers if answer.error), ""),
        "elapsed_s": elapsed_s,
        "output_tok_s": sum(answer.num_output for answer in good) / elapsed_s if good else 0.0,
        "ttft_ms": distribution([answer.ttft_s for answer in good], 1e3),
        "tpot_ms": distribution([answer.tpot_s for answer in many], 1e3),
        "e2e_ms": distribution([answer.arrivals_s[-1] - answer.sent_s for answer in good], 1e3),
        "itl_ms": distribution([gap for answer in many for _, gap in answer.gaps_s], 1e3),
    }


def mixed_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of "decode" clients while "prompt" clients arrive: what happens from the first prompt's sending to the last one's
    answer. Gaps are counted where they end in that time."""
    good = [answer for answer in answers if not answer.error]
    prompts = [answer for answer in good if answer.group == "prompt"]
    decodes = [answer for answer in good if answer.group == "decode"]
    failed = [answer.error for answer in answers if answer.error]
    if not prompts or not decodes:
        return {"num_failed": len(failed), "first_error": failed[0] if failed else "no client of one kind"}
    began_s, ended_s = min(a.sent_s for a in prompts), max(a.arrivals_s[-1] for a in prompts)
    gaps_s = [gap for answer in decodes for when, gap in answer.gaps_s if began_s <= when <= ended_s]
    arrived = sum(began_s <= when <= ended_s for answer in decodes for when in answer.arrivals_s)
    return {
        "num_failed": len(failed),
        "first_error": failed[0] if failed else "",
        "window_s": ended_s - began_s,
        "all_decoded_throughout": all(a.arrivals_s[0] <= began_s and a.arrivals_s[-1] >= ended_s for a in decodes),
        "decode_tok_s": arrived / (ended_s - began_s),
        "total_tok_s": (arrived + sum(a.num_prompt + a.num_output for a in prompts)) / (ended_s - began_s),
        "gap_ms": distribution(gaps_s, 1e3),
        "prompt_ttft_ms": distribution([answer.ttft_s for answer in prompts], 1e3),
    }
