"""`tensorweave bench overhead`: a step of the executor outside the forward, with an engine that computes nothing."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Final

from tensorweave.cli.figures import percentile, publish, report
from tensorweave.cli.prompts import random_prompts
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec

if TYPE_CHECKING:
    from tensorweave.workers.executor.executor import PyExecutor

VOCAB_SIZE: Final = 1024
TOKENS_PER_BLOCK: Final = 32
_DRAIN_TIMEOUT_S: Final = 300.0


def run_overhead(args: argparse.Namespace) -> int:
    rows = [measure(batch_size, args.input_len, args.num_steps, args.seed) for batch_size in args.batch_sizes]
    settings = {"input_len": args.input_len, "num_steps": args.num_steps, "batch_sizes": args.batch_sizes}
    publish(report("overhead", settings, {"rows": rows}), args.json)
    return 0


def measure(batch_size: int, input_len: int, num_steps: int, seed: int) -> dict[str, float]:
    """Milliseconds of a decode step outside the forward, sampling included, with `batch_size` equal requests.

    `wall_ms` is the whole loop per step, including the thread that takes the answers.
    """
    executor = _make_executor(batch_size, input_len, num_steps)
    sampling = SamplingSpec(max_tokens=num_steps)
    prompts = random_prompts(batch_size, input_len, VOCAB_SIZE, seed)
    executor.enqueue_requests([GenerateRequest(f"r{n}", ids, sampling) for n, ids in enumerate(prompts)])
    elapsed_s = _run(executor, batch_size)
    steps = [
        s for s in executor.get_latest_iteration_stats() if s["inflightBatchingStats"]["numGenRequests"] == batch_size
    ]
    executor.shutdown()
    outside = sorted(step["iterLatencyMS"] - step["forwardLatencyMS"] for step in steps)
    return {
        "batch_size": batch_size,
        "num_steps": len(steps),
        "outside_forward_ms_median": percentile(outside, 50),
        "outside_forward_ms_mean": statistics.fmean(outside),
        "outside_forward_ms_p99": percentile(outside, 99),
        "wall_ms": elapsed_s * 1e3 / num_steps,
    }


def _make_executor(batch_size: int, input_len: int, num_steps: int) -> PyExecutor:
    from tensorweave.workers.executor.executor import PyExecutor
    from tensorweave.workers.executor.scheduler import SimpleScheduler
    from tensorweave.workers.fakes.fake_engine import EmptyEngine
    from tensorweave.workers.gang.comm import SoloComm
    from tensorweave.workers.kv.manager import KVCacheManager
    from tensorweave.workers.sampling.decoder import SamplingDecoder
    from tensorweave.workers.step.resources import ResourceManager

    max_len = input_len + num_steps + 1
    num_blocks = batch_size * (-(-max_len // TOKENS_PER_BLOCK) + 1)
    engine = EmptyEngine(num_blocks, TOKENS_PER_BLOCK, max_len, VOCAB_SIZE)
    kv_cache = KVCacheManager(num_blocks=num_blocks, tokens_per_block=TOKENS_PER_BLOCK)
    decoder = SamplingDecoder()
    return PyExecutor(
        engine=engine,
        scheduler=SimpleScheduler(kv_cache, max_batch_size=batch_size, max_num_tokens=batch_size * input_len),
        resources=ResourceManager([decoder.states, kv_cache]),
        decoder=decoder,
        comm=SoloComm(),
        info=engine.info,
        max_requests=batch_size,
        max_stats=num_steps + batch_size + 16,
    )


def _run(executor: PyExecutor, num_requests: int) -> float:
    """Run the executor until its requests have ended; return the seconds."""
    began_s = time.perf_counter()
    executor.start()
    num_over = 0
    while num_over < num_requests:
        if time.perf_counter() - began_s > _DRAIN_TIMEOUT_S or not executor.is_alive:
            raise TimeoutError(f"{num_over} of {num_requests} requests ended: {executor.failure}")
        num_over += sum(chunk.is_last for chunk in executor.await_responses(timeout_s=1.0))
    return time.perf_counter() - began_s
