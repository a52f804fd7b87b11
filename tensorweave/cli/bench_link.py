"""`tensorweave bench link`: what HTTP adds to the engine's time to first token, at one client.

Each prompt is sent over HTTP to a running service and to an `LLM` in this process, alternately; both engines have the
same configuration. The figure is the median over HTTP less the median in process.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from typing import Any

from tensorweave.cli.bench_engine import follow
from tensorweave.cli.bench_http import served_model
from tensorweave.cli.figures import distribution, publish, report
from tensorweave.cli.http_stream import Connection
from tensorweave.cli.serve import config_changes, config_path

_WORDS = ("stone", "river", "cloud", "seven", "paper", "garden", "window", "silver", "train", "letter", "bridge")


def run_link(args: argparse.Namespace) -> int:
    from tensorweave import LLM
    from tensorweave.deploy.config import load_config
    from tensorweave.workers.store.model_store import resolve_model

    config = load_config(config_path(args.config), config_changes(args))
    options = config.shared_args.model_dump(mode="json", exclude_unset=True)
    options["model"] = resolve_model(config.model)
    model = served_model(args.url, args.api_key)
    with LLM(**options) as llm:
        http_s, local_s = asyncio.run(_alternate(llm, model, args))
    pairs = [over - inside for over, inside in zip(http_s, local_s, strict=True)]
    http_ms, local_ms = distribution(http_s, 1e3), distribution(local_s, 1e3)
    figures = {
        "link_ms": http_ms["median"] - local_ms["median"],
        "http_ttft_ms": http_ms,
        "local_ttft_ms": local_ms,
        "paired_difference_ms": distribution(pairs, 1e3),
        "runs": [{"http_ms": a * 1e3, "local_ms": b * 1e3} for a, b in zip(http_s, local_s, strict=True)],
    }
    settings = {"url": args.url, "num_prompts": args.num_prompts, "num_words": args.num_words, "options": options}
    publish(report("link", settings, figures), args.json)
    return 0


async def _alternate(llm: Any, model: str, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """TTFTs in seconds. The first side alternates too, so that neither always finds the caches warm."""
    from tensorweave import SamplingParams

    connection = Connection(args.url, args.api_key, args.timeout)
    sampling = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    words = random.Random(args.seed)
    http_s: list[float] = []
    local_s: list[float] = []
    for number in range(-args.num_warmups, args.num_prompts):
        prompt = " ".join(words.choices(_WORDS, k=args.num_words))
        body = {"model": model, "prompt": prompt, "max_tokens": args.output_len, "temperature": 0, "stream": True}

        async def over_http(body: dict[str, Any] = body) -> float:
            return (await connection.stream("/v1/completions", {**body, "ignore_eos": True})).ttft_s

        async def in_process(prompt: str = prompt) -> float:
            return (await follow(llm, prompt, sampling)).ttft_s

        if number % 2:
            over, inside = await over_http(), await in_process()
        else:
            inside, over = await in_process(), await over_http()
        if number >= 0:
            http_s.append(over)
            local_s.append(inside)
    connection.close()
    return http_s, local_s
