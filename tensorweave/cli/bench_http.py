"""`tensorweave bench serve`: load on any OpenAI endpoint, at a concurrency or a request rate."""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tensorweave.cli.arguments import bearer
from tensorweave.cli.chat import first_model
from tensorweave.cli.figures import distribution, publish, report, settings_of
from tensorweave.cli.http_stream import Connection, RequestFailed, Timeline
from tensorweave.cli.prompts import random_prompts, vocab_size_of
from tensorweave.workers.store.model_store import resolve_model


@dataclass(slots=True)
class Load:
    """The outcomes of all requests."""

    answers: list[Timeline] = field(default_factory=list)
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    first_messages: dict[str, str] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        output = sum(answer.num_output for answer in self.answers)
        prompt = sum(int(answer.usage.get("prompt_tokens") or 0) for answer in self.answers)
        many = [answer for answer in self.answers if answer.num_output > 1]
        gaps = [b - a for answer in self.answers for a, b in zip(answer.piece_s, answer.piece_s[1:], strict=False)]
        return {
            "num_answered": len(self.answers),
            "num_failed": self.failures.total(),
            "failures": dict(self.failures),
            "first_messages": self.first_messages,
            "elapsed_s": self.elapsed_s,
            "request_per_s": len(self.answers) / self.elapsed_s,
            "output_tok_s": output / self.elapsed_s,
            "total_tok_s": (output + prompt) / self.elapsed_s,
            "num_prompt_tokens": prompt,
            "num_output_tokens": output,
            "ttft_ms": distribution([answer.ttft_s for answer in self.answers], 1e3),
            "tpot_ms": distribution([(a.e2e_s - a.ttft_s) / (a.num_output - 1) for a in many], 1e3),
            "itl_ms": distribution(gaps, 1e3),
            "e2e_ms": distribution([answer.e2e_s for answer in self.answers], 1e3),
        }


def run_serve(args: argparse.Namespace) -> int:
    model = args.model or served_model(args.url, args.api_key)
    bodies = make_bodies(args, model)
    load = asyncio.run(apply_load(args, bodies))
    publish(report("serve", {**settings_of(args), "model": model}, load.figures()), args.json)
    return 0 if load.answers and not load.failures else 1


def make_bodies(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Completions get exactly `--input-len` token ids; chats get text, decoded from as many if there is a tokenizer."""
    directory = None if args.tokenizer is None else resolve_model(args.tokenizer)
    vocab_size = args.vocab_size if directory is None else vocab_size_of(directory)
    prompts = random_prompts(args.num_prompts, args.input_len, vocab_size, args.seed)
    shared: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    shared |= {"max_tokens": args.output_len, "temperature": args.temperature, "ignore_eos": not args.stop_at_eos}
    if args.endpoint == "completions":
        return [{**shared, "prompt": prompt} for prompt in prompts]
    texts = _texts(prompts, directory)
    return [{**shared, "messages": [{"role": "user", "content": text}]} for text in texts]


def _texts(prompts: list[list[int]], tokenizer_dir: Path | None) -> list[str]:
    if tokenizer_dir is None:
        return [" ".join(f"w{token}" for token in prompt[: max(1, len(prompt) // 4)]) for prompt in prompts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return [str(tokenizer.decode(prompt)) for prompt in prompts]


async def apply_load(args: argparse.Namespace, bodies: list[dict[str, Any]]) -> Load:
    """Send every body at its arrival time (`--request-rate`), once a connection is free (`--concurrency`)."""
    load, path = Load(), "/v1/chat/completions" if args.endpoint == "chat" else "/v1/completions"
    free: asyncio.Queue[Connection] = asyncio.Queue()
    connections = [Connection(args.url, args.api_key, args.timeout) for _ in range(args.concurrency)]
    for connection in connections:
        free.put_nowait(connection)
    for body in bodies[: args.num_warmups]:
        await _send(connections[0], path, body, Load())
    arrivals_s = _arrival_times(len(bodies), args.request_rate, args.seed)
    began_s = time.perf_counter()

    async def one(body: dict[str, Any], arrival_s: float) -> None:
        await asyncio.sleep(max(0.0, began_s + arrival_s - time.perf_counter()))
        connection = await free.get()
        try:
            await _send(connection, path, body, load)
        finally:
            free.put_nowait(connection)

    async with asyncio.TaskGroup() as tasks:
        for body, arrival_s in zip(bodies, arrivals_s, strict=True):
            tasks.create_task(one(body, arrival_s))
    load.elapsed_s = time.perf_counter() - began_s
    for connection in connections:
        connection.close()
    return load


async def _send(connection: Connection, path: str, body: dict[str, Any], load: Load) -> None:
    try:
        load.answers.append(await connection.stream(path, body))
    except RequestFailed as failure:
        load.failures[failure.kind] += 1
        load.first_messages.setdefault(failure.kind, str(failure))


def _arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """A Poisson process of `rate` per second, the same for the same seed; all at once for an infinite rate."""
    draws, now_s, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now_s)
        now_s += 0.0 if rate == float("inf") else draws.expovariate(rate)
    return times


def served_model(url: str, api_key: str | None) -> str:
    with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=bearer(api_key), timeout=10.0) as client:
        return first_model(client)
