"""`tensorweave bench throughput` and `latency`: the engine alone, through the `LLM` class."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from typing import Any

from tensorweave.cli.figures import distribution, publish, report, settings_of
from tensorweave.cli.http_stream import Timeline
from tensorweave.cli.prompts import random_prompts, vocab_size_of
from tensorweave.workers.store.model_store import resolve_model

_WARMUP_TOKENS = 8


def run_throughput(args: argparse.Namespace) -> int:
    from tensorweave import LLM, SamplingParams

    directory = resolve_model(args.model)
    vocab_size = vocab_size_of(directory)
    runs = []
    with LLM(model=directory, skip_tokenizer_init=True, **engine_options(args)) as llm:
        warmup = random_prompts(args.num_prompts, args.input_len, vocab_size, args.seed)
        llm.generate(warmup, SamplingParams(max_tokens=_WARMUP_TOKENS, ignore_eos=True), use_tqdm=False)
        sampling = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
        for run in range(args.num_runs):
            prompts = random_prompts(args.num_prompts, args.input_len, vocab_size, args.seed + 1 + run)
            began_s = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            elapsed_s = time.perf_counter() - began_s
            num_output = sum(output.outputs[0].length for output in outputs)
            if num_output != args.num_prompts * args.output_len:
                raise AssertionError(
                    f"{num_output} tokens were generated instead of {args.num_prompts * args.output_len}"
                )
            runs.append(_run_figures(elapsed_s, num_output, args.num_prompts * args.input_len))
    figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    publish(report("throughput", settings_of(args), {**figures, "runs": runs}), args.json)
    return 0


def run_latency(args: argparse.Namespace) -> int:
    """`--batch-size` requests at once, `--num-iters` times: the latencies of each request."""
    from tensorweave import LLM, SamplingParams

    directory = resolve_model(args.model)
    vocab_size = vocab_size_of(directory)
    timelines: list[Timeline] = []
    with LLM(model=directory, skip_tokenizer_init=True, **engine_options(args)) as llm:
        for iteration in range(-args.num_warmups, args.num_iters):
            prompts = random_prompts(args.batch_size, args.input_len, vocab_size, args.seed + iteration)
            sampling = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
            batch = asyncio.run(_together(llm, prompts, sampling))
            timelines += batch if iteration >= 0 else []
    many = [line for line in timelines if len(line.piece_s) > 1]
    gaps = [b - a for line in timelines for a, b in zip(line.piece_s, line.piece_s[1:], strict=False)]
    figures = {
        "ttft_ms": distribution([line.ttft_s for line in timelines], 1e3),
        "tpot_ms": distribution([(line.e2e_s - line.ttft_s) / (args.output_len - 1) for line in many], 1e3),
        "itl_ms": distribution(gaps, 1e3),
        "e2e_ms": distribution([line.e2e_s for line in timelines], 1e3),
    }
    publish(report("latency", settings_of(args), figures), args.json)
    return 0


async def _together(llm: Any, prompts: list[list[int]], sampling: Any) -> list[Timeline]:
    return list(await asyncio.gather(*(follow(llm, prompt, sampling) for prompt in prompts)))


async def follow(llm: Any, prompt: list[int] | str, sampling: Any) -> Timeline:
    """Stream one request in process; a piece is what arrived at one time."""
    timeline = Timeline(time.perf_counter())
    async for output in llm.generate_async(prompt, sampling, streaming=True):
        if output.outputs[0].token_ids_diff:
            timeline.piece_s.append(time.perf_counter())
    timeline.finish_reason = "length"
    return timeline


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """`LLM` arguments of the command line: the two named ones, then `--set` keys as in a service's `engine` section."""
    from tensorweave.deploy.config_file import read_document

    named = {"dtype": args.dtype, "tensor_parallel_size": args.tensor_parallel_size}
    return named | read_document(os.devnull, args.changes).checked().data


def _run_figures(elapsed_s: float, num_output: int, num_prompt: int) -> dict[str, float]:
    return {
        "output_tok_s": num_output / elapsed_s,
        "total_tok_s": (num_output + num_prompt) / elapsed_s,
        "elapsed_s": elapsed_s,
    }
