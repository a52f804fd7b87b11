"""`tensorweave bench overhead`: a step of the executor outside the forward, with an engine that computes nothing."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from tensorweave.cli.figures import percentile, publish, report
from tensorweave.cli.prompts import random_prompts
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec

if TYPE_CHECKING:
    from tensorweave.workers.executor.executor import PyExecutor

VOCAB_SIZE: Final = 1024
TOKENS_PER_BLOCK: Final = 32
SWITCH_INTERVAL_S: Final = 0.001  # as on a rank
_DRAIN_TIMEOUT_S: Final = 300.0


def run_overhead(args: argparse.Namespace) -> int:
    rows = [measure(batch_size, args.input_len, args.num_steps, args.seed) for batch_size in args.batch_sizes]
    if args.device_ms:
        for row in rows:
            row |= measure_overlap(int(row["batch_size"]), args.input_len, args.num_steps, args.seed, args.device_ms)
    settings = {"input_len": args.input_len, "num_steps": args.num_steps, "batch_sizes": args.batch_sizes}
    publish(report("overhead", settings, {"rows": rows}), args.json)
    return 0


def measure(batch_size: int, input_len: int, num_steps: int, seed: int) -> dict[str, float]:
    """Decode steps of `batch_size` requests, all alike: milliseconds of a step outside the forward, decoding included.

    `wall_ms` is the whole loop from step to step, the thread that takes the answers included.
    """
    from tensorweave.workers.fakes.fake_engine import EmptyEngine

    engine = EmptyEngine(**_sizes(batch_size, input_len, num_steps))
    elapsed_s, _, steps = _run(engine, batch_size, input_len, num_steps, seed)
    outside = sorted(step["iterLatencyMS"] - step["forwardLatencyMS"] for step in steps)
    return {
        "batch_size": batch_size,
        "num_steps": len(steps),
        "outside_forward_ms_median": percentile(outside, 50),
        "outside_forward_ms_mean": statistics.fmean(outside),
        "outside_forward_ms_p99": percentile(outside, 99),
        "wall_ms": elapsed_s * 1e3 / num_steps,
    }


def measure_overlap(batch_size: int, input_len: int, num_steps: int, seed: int, device_ms: float) -> dict[str, float]:
    """Decode steps a second over a device that takes `device_ms` for each, one at a time and overlapped."""
    from tensorweave.workers.fakes.fake_engine import TimedEngine

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    rates: dict[str, float] = {}
    for name, disabled in (("steps_per_s", True), ("steps_per_s_overlapped", False)):
        engine = TimedEngine(device_ms / 1e3, **_sizes(batch_size, input_len, num_steps))
        _, decoding_s, _ = _run(engine, batch_size, input_len, num_steps, seed, disabled)
        rates[name] = (num_steps - 1) / decoding_s
    return rates


def _sizes(batch_size: int, input_len: int, num_steps: int) -> dict[str, int]:
    max_len = input_len + num_steps + 1
    return {
        "num_blocks": batch_size * (-(-max_len // TOKENS_PER_BLOCK) + 1),
        "tokens_per_block": TOKENS_PER_BLOCK,
        "max_seq_len": max_len,
        "vocab_size": VOCAB_SIZE,
    }


def _run(
    engine: Any, batch_size: int, input_len: int, num_steps: int, seed: int, disable_overlap_scheduler: bool = True
) -> tuple[float, float, list[dict[str, Any]]]:
    """Seconds until all requests have ended, seconds since the first token, and the statistics of the steps in which
    all of them decode."""
    executor = _make_executor(engine, batch_size, input_len, num_steps, disable_overlap_scheduler)
    sampling = SamplingSpec(max_tokens=num_steps)
    prompts = random_prompts(batch_size, input_len, VOCAB_SIZE, seed)
    executor.enqueue_requests([GenerateRequest(f"r{n}", ids, sampling) for n, ids in enumerate(prompts)])
    elapsed_s, decoding_s = _time_requests(executor, batch_size)
    steps = [
        s for s in executor.get_latest_iteration_stats() if s["inflightBatchingStats"]["numGenRequests"] == batch_size
    ]
    executor.shutdown()
    return elapsed_s, decoding_s, steps


def _make_executor(
    engine: Any, batch_size: int, input_len: int, num_steps: int, disable_overlap_scheduler: bool
) -> PyExecutor:
    from tensorweave.workers.executor.executor import PyExecutor
    from tensorweave.workers.executor.scheduler import SimpleScheduler
    from tensorweave.workers.gang.comm import SoloComm
    from tensorweave.workers.kv.manager import KVCacheManager
    from tensorweave.workers.sampling.decoder import SamplingDecoder
    from tensorweave.workers.step.resources import ResourceManager

    kv_cache = KVCacheManager(num_blocks=engine.info.num_blocks, tokens_per_block=TOKENS_PER_BLOCK)
    decoder = SamplingDecoder()
    return PyExecutor(
        engine=engine,
        scheduler=SimpleScheduler(kv_cache, max_batch_size=batch_size, max_num_tokens=batch_size * input_len),
        resources=ResourceManager([decoder.states, *engine.resource_managers, kv_cache]),
        decoder=decoder,
        comm=SoloComm(),
        info=engine.info,
        max_requests=batch_size,
        max_stats=num_steps + batch_size + 16,
        disable_overlap_scheduler=disable_overlap_scheduler,
    )


def _time_requests(executor: PyExecutor, num_requests: int) -> tuple[float, float]:
    """Run the executor until its requests have ended. Return the seconds since its start and since the first token."""
    began_s = first_s = time.perf_counter()
    executor.start()
    num_over = num_taken = 0
    while num_over < num_requests:
        if time.perf_counter() - began_s > _DRAIN_TIMEOUT_S or not executor.is_alive:
            raise TimeoutError(f"{num_over} of {num_requests} requests ended: {executor.failure}")
        chunks = executor.await_responses(timeout_s=1.0)
        first_s = first_s if num_taken else time.perf_counter()
        num_taken += len(chunks)
        num_over += sum(chunk.is_last for chunk in chunks)
    ended_s = time.perf_counter()
    return ended_s - began_s, ended_s - first_s
