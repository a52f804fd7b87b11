"""What `LLM.generate` costs the host: requests over an engine that computes nothing and takes a given time a step.

    python benchmarks/llm_overhead.py --batch-sizes 64 256 512 --num-steps 256 --device-ms 10 [--tokenizer DIR]

Prints, per batch size, the time per step against the device's, and the processor time per token by thread: of the step
loop, the event loop of the LLM, the caller. All of them share the interpreter with the step loop.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorweave import LLM, SamplingParams
from tensorweave.llmapi import engine as llm_engine
from tensorweave.llmapi import runtime as llm_runtime
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import TimedEngine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.resources import ResourceManager

VOCAB_SIZE = 1024
INPUT_LEN = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--num-steps", type=int, default=256)
    parser.add_argument("--device-ms", type=float, default=10.0)
    parser.add_argument("--tokenizer", help="a model's directory: answers get their text too")
    args = parser.parse_args()
    llm_runtime.check_model = lambda _: None  # type: ignore[assignment]
    for batch_size in args.batch_sizes:
        llm_engine.build_executor = _executor_of(batch_size, args.num_steps, args.device_ms / 1e3)
        print(json.dumps(measure(batch_size, args.num_steps, args.device_ms, args.tokenizer)))


def measure(batch_size: int, num_steps: int, device_ms: float, tokenizer: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as empty:
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE}
        (Path(empty) / "config.json").write_text(json.dumps(config))
        with LLM(tokenizer or empty, skip_tokenizer_init=tokenizer is None) as llm:
            prompts = [[(7 * n + at) % VOCAB_SIZE for at in range(INPUT_LEN)] for n in range(batch_size)]
            llm.generate(prompts[:2], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
            llm.get_stats()
            before, began_s = _processor_s(), time.perf_counter()
            llm.generate(prompts, SamplingParams(max_tokens=num_steps, ignore_eos=True), use_tqdm=False)
            elapsed_s, after = time.perf_counter() - began_s, _processor_s()
            outside_ms = [step["iterLatencyMS"] - step["forwardLatencyMS"] for step in llm.get_stats()]
    num_tokens = batch_size * num_steps
    by_thread = {name: (after[name] - before[name]) * 1e6 / num_tokens for name in after}
    return {
        "batch_size": batch_size,
        "device_ms": device_ms,
        "step_ms": round(elapsed_s * 1e3 / num_steps, 2),
        "outside_forward_ms": round(statistics.median(outside_ms), 3),
        "us_per_token": {name: round(us, 2) for name, us in by_thread.items() if us >= 0.05},
    }


def _executor_of(batch_size: int, num_steps: int, step_s: float) -> Callable[..., PyExecutor]:
    def build(*_: Any, **__: Any) -> PyExecutor:
        max_len = INPUT_LEN + num_steps + 1
        num_blocks = batch_size * (-(-max_len // 32) + 1)
        engine = TimedEngine(step_s, num_blocks=num_blocks, max_seq_len=max_len, vocab_size=VOCAB_SIZE)
        kv_cache, decoder = KVCacheManager(num_blocks, 32), SamplingDecoder()
        return PyExecutor(
            engine=engine,
            scheduler=SimpleScheduler(kv_cache, max_batch_size=batch_size, max_num_tokens=batch_size * INPUT_LEN),
            resources=ResourceManager([decoder.states, *engine.resource_managers, kv_cache]),
            decoder=decoder,
            comm=SoloComm(),
            info=engine.info,
            disable_overlap_scheduler=False,
            max_requests=batch_size,
            max_stats=num_steps + batch_size,
        )

    return build


def _processor_s() -> collections.Counter[str]:
    """Seconds on a processor so far, by what a thread is for."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    seconds: collections.Counter[str] = collections.Counter()
    for task in Path("/proc/self/task").iterdir():
        name = names.get(int(task.name), "others")
        name = "llm-loop" if name.endswith("-loop") else name.removesuffix("_0")
        seconds[name] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


if __name__ == "__main__":
    main()
